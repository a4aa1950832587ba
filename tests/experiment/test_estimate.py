"""The dry run's arithmetic, against what real runs on the CPU compute and hold."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from streamvid.experiment import estimate as est
from streamvid.experiment.build import build_method, build_student, needs_teacher
from streamvid.experiment.config import load_run
from streamvid.experiment.on_meta import batch_on_meta, build_on_meta, depth_of, text_tokens_of
from streamvid.metering import FLOPS, Meter, as_on_accelerator
from streamvid.models.published import EXPERTS, PUBLISHED
from streamvid.teachers.wan import WanTeacher, load_wan_transformer
from streamvid.training.optimizers import build_optimizer, optimizer_tensors
from streamvid.training.trainer import switch_on

TINY = "configs/run/tiny_{}.yaml"
SMALL = ["train.batch_size=1", "train.max_steps=4"]


def of_tensors(formula):
    """As torch's counter takes a formula that reads the shapes itself."""
    wrapped = lambda *args, **kwargs: formula(*args, **kwargs)
    wrapped._get_raw = True
    return wrapped


CPU_ATTENTION = {op: of_tensors(formula) for op, formula in FLOPS.items() if "for_cpu" in str(op)}
METHODS = ["dmd", "asd", "diagonal", "afd", "sft", "trajectory"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A checkpoint of two blocks."""
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=24,
        ffn_dim=96,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=32,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    SMALL[2:] = [f"teacher.path={tmp_path_factory.mktemp('wan')}"]
    network.save_pretrained(f"{SMALL[2].split('=')[1]}/transformer")
    SMALL.append("student." + SMALL[2].split(".", 1)[1])


def run_of(method, *more):
    early = ["options.student_start_step=0"] if method in ("dmd", "asd", "diagonal", "afd") else []
    small = [each for each in SMALL if method != "teacher" or not each.startswith("student")]
    return load_run(TINY.format(method), [*small, *early, *more])


def roles_on_meta(config, depth=None):
    return est.roles_of(config, build_on_meta(config, depth))


def really(config, turn, step):
    """FLOPs and peak bytes of the same turn on the CPU, with real weights."""
    student = build_student(config.student)
    teacher = None
    if needs_teacher(config):
        teacher = WanTeacher(load_wan_transformer(config.teacher.path), None, shift=1.0)
        teacher.uncond = torch.zeros(text_tokens_of(config), 64)
    method = build_method(config, student, torch.zeros(text_tokens_of(config), 64), teacher)
    switch_on(method.networks(), config.train)
    for name, network in method.networks().items():
        network.train().requires_grad_(name == turn)
    batch = {
        key: torch.randn(value.shape) if torch.is_tensor(value) and value.is_meta else value
        for key, value in batch_on_meta(config, method).items()
    }
    with (
        Meter() as meter,
        FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
    ):
        loss, _ = method.loss(turn, batch, step)
        loss.backward()
    return meter.flops, counter.get_total_flops(), method, batch


@pytest.mark.parametrize("method", METHODS)
def test_operations_are_those_of_a_real_turn(method):
    """The same method, once without data and once with: the same matrix products."""
    config = run_of(method)
    on_meta = build_on_meta(config)
    for turn in sorted(set(on_meta.turns(1))):
        batch = batch_on_meta(config, on_meta)
        expected, _ = est.measure_turn(on_meta, turn, batch, 1, config)
        ours, torchs, _, _ = really(config, turn, 1)
        # of a few queries the CPU takes another kernel
        assert expected == pytest.approx(ours, rel=1e-3), turn
        assert ours == torchs, "torch's own counter"


@pytest.mark.parametrize(
    "method", ["dmd", pytest.param("afd", marks=pytest.mark.slow), "sft", "trajectory"]
)
def test_steps_of_equal_choices_cost_the_same(method):
    """What a method names as its choices is all that the operations of its turns depend on."""
    config = run_of(method)
    built = build_on_meta(config)
    costs = {}
    for step in range(4):
        flops, _ = est.measure_turn(built, "student", batch_on_meta(config, built), step, config)
        assert costs.setdefault(built.choices("student", step), flops) == flops
    assert len(set(costs.values())) == len(costs)


@pytest.mark.slow
def test_a_method_that_tells_no_choices_is_measured_in_every_step():
    """A rollout that ends anywhere: the estimate is the mean over steps, not the first one's
    cost.
    """

    class Telltale:
        def __init__(self, method):
            self.objective, self.networks, self.turns = (
                method.objective,
                method.networks,
                method.turns,
            )
            self.loss = method.loss

    config = run_of("dmd", "train.max_steps=6")
    method = build_on_meta(config)
    (student,) = [turn for turn in est.turns_of(config, Telltale(method)) if turn.name == "student"]
    steps = [step for step in range(6) if "student" in method.turns(step)]
    costs = [
        est.measure_turn(method, "student", batch_on_meta(config, method), step, config)[0]
        for step in steps
    ]
    assert len(set(costs)) > 1 and student.flops == pytest.approx(sum(costs) / len(costs))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_real_turn_holds(checkpointing):
    """The most bytes of live tensors, against the same watch over real ones; attention on the CPU
    differs a little.
    """
    config = run_of("dmd", f"train.gradient_checkpointing={str(checkpointing).lower()}")
    on_meta = build_on_meta(config)
    _, peaks = est.measure_turn(on_meta, "student", batch_on_meta(config, on_meta), 1, config)
    _, _, method, batch = really(config, "student", 1)
    method.student.zero_grad(set_to_none=True)
    with Meter() as meter:
        loss = method.loss("student", batch, 1)[0]
        forward, meter.peak = meter.peak, meter.now
        loss.backward()
    assert peaks == pytest.approx((forward, meter.peak), rel=0.1)


@pytest.mark.parametrize("method", ["dmd", "afd", "sft"])
def test_networks_take_what_they_really_take(method):
    config = run_of(method)
    roles = roles_on_meta(config)
    _, _, real, _ = really(config, "student", 1)
    role = next(each for each in roles if each.name == "student")
    parameters = dict(real.student.named_parameters())
    optimizer = build_optimizer(parameters, config.train.optimizers["student"])
    for parameter in parameters.values():
        parameter.requires_grad_(True).grad = torch.zeros_like(parameter)
    optimizer.step()
    held = optimizer_tensors(optimizer, {p: name for name, p in parameters.items()}).values()
    assert role.optimizer == sum(t.nbytes for t in held)
    assert role.weights == role.average == sum(p.nbytes for p in parameters.values())
    names = {
        "dmd": {"student", "fake_score", "teacher"},
        "afd": {"student", "discriminator", "lagged"},
        "sft": {"student"},
    }
    assert {each.name for each in roles} == names[method]


def test_deep_networks_are_extrapolated_exactly(monkeypatch):
    deep = [
        "student.path=null",
        "student.geometry.num_layers=9",
        "student.geometry.num_attention_heads=1",
    ]
    config = run_of("sft", *deep)
    assert depth_of(config) == 9
    line = est.estimate(config)
    monkeypatch.setattr(est, "DEPTHS", (8, 9))
    whole = est.estimate(config)
    assert whole.roles == line.roles
    assert line.flops == pytest.approx(whole.flops, rel=1e-12)
    assert line.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.02)


def test_casts_of_weights_live_until_the_loss_and_those_of_sharded_ones_not():
    """A checkpointed network of large weights: its casts are half the weights' bytes, for as long
    as autocast's cache keeps them.
    """
    bf16 = ["train.mixed_precision=bf16", "train.gradient_checkpointing=true"]
    wide = [f"student.geometry.{name}" for name in ("num_layers=6", "ffn_dim=8192")]
    peaks = {}
    for shard in ("none", "full"):
        config = run_of("teacher", *bf16, *wide, f"train.shard={shard}")
        (role,), (turn,) = roles_on_meta(config), est.estimate(config).turns
        peaks[shard] = turn.peaks
    casts = peaks["none"][0] - peaks["full"][0]
    assert 0.4 * role.weights < casts < 0.5 * role.weights
    assert peaks["none"][1] == peaks["full"][1]


def test_autocast_is_played():
    """bf16 halves what products leave behind; weights that are trained are cast once, frozen ones
    at each use.
    """
    full, half = (
        est.estimate(run_of("sft", f"train.mixed_precision={mode}")) for mode in ("no", "bf16")
    )
    assert half.flops == full.flops
    assert 0.4 * full.turns[0].peak < half.turns[0].peak < 0.9 * full.turns[0].peak
    x, w = torch.empty(4, 8, device="meta"), torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    with as_on_accelerator("bf16"):
        assert F.linear(x, w).dtype == torch.bfloat16
    assert F.linear(x, w).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14_288_491_584),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 16_396_000_000),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 4_999_787_712),
    ],
)
def test_published_sizes(name, parameters):
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        network = WanTransformer3DModel(**PUBLISHED[name])
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=1e-4)


def test_a_published_run_is_estimated_without_its_checkpoint():
    """1.3B in float32 with AdamW and an average, a copy of it as fake score, a teacher in half
    precision.
    """
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    config = run_of(
        "dmd",
        f"student.path={name}",
        f"teacher.path={name}",
        "teacher.dtype=bf16",
        "teacher.offload=false",
    )
    roles = roles_on_meta(config, depth=30)
    sizes = {role.name: role for role in roles}
    weights = 4 * 1_418_996_800
    assert sizes["student"].weights == sizes["student"].average == weights
    # and diffusers' table of rotations
    assert sizes["fake_score"].weights == pytest.approx(weights, rel=1e-3)
    assert sizes["student"].optimizer == pytest.approx(2 * weights, rel=1e-5)
    # what diffusers keeps in float32
    assert sizes["teacher"].weights == pytest.approx(weights / 2, rel=0.01)


def test_two_experts_are_counted_twice_unless_one_is_put_away():
    name = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert name in EXPERTS
    more = [f"teacher.path={name}", "student.path=Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    both, one = (
        roles_on_meta(run_of("dmd", *more, f"teacher.offload={o}"), 1) for o in ("false", "true")
    )
    assert [role.name for role in both if role not in one] == ["teacher, expert 2"]


def test_shared_weights_are_counted_once():
    """Three roles on one set of weights: the student's and the fake score's own are their
    adapters.
    """
    pytest.importorskip("peft")
    whole = roles_on_meta(run_of("dmd"))
    one = roles_on_meta(run_of("dmd", "student.lora.rank=4"))
    own = {role.name: role.parameters for role in one}
    assert own["teacher"] == whole[-1].parameters
    layers = [(48, 48)] * 8 + [(48, 96), (96, 48)]  # of two attentions and the feed-forward network
    assert own["student"] == own["fake_score"] == 2 * sum(4 * (i + o) for i, o in layers)


def test_too_little_memory_is_refused_before_the_attempt(monkeypatch):
    config = run_of("dmd")
    monkeypatch.setattr(est, "memory_of", lambda device: 10**5)
    with pytest.raises(
        ValueError, match=r"need 0\.\d\d GiB, free on cpu are 0\.00; --dry-run says"
    ):
        est.ensure_memory(config, torch.device("cpu"))
    monkeypatch.setattr(est, "memory_of", lambda device: 10**9)
    est.ensure_memory(config, torch.device("cpu"))


def test_a_peak_that_does_not_fit_is_refused_though_the_networks_do(monkeypatch):
    config = run_of("sft")
    whole = est.estimate(config)
    monkeypatch.setattr(est, "memory_of", lambda device: (whole.state_bytes + whole.peak_bytes) / 2)
    with pytest.raises(
        ValueError, match=r"at its peak, in the turn of student, free on cpu are 0\.\d\d"
    ):
        est.ensure_memory(config, torch.device("cpu"))
    monkeypatch.setattr(est, "memory_of", lambda device: 1.1 * whole.peak_bytes)
    est.ensure_memory(config, torch.device("cpu"))


def test_small_networks_are_not_measured_before_a_run(monkeypatch):
    """It takes seconds, and their peaks are at most some 50 times as large."""
    config = run_of("sft")
    monkeypatch.setattr(
        est,
        "memory_of",
        lambda device: 101 * est.Estimate(roles_on_meta(config)).state_bytes,
    )
    monkeypatch.setattr(est, "estimate", None)
    est.ensure_memory(config, torch.device("cpu"))


def test_gradients_of_sharded_networks_are_not_held_against_a_run():
    one = est.Estimate(
        (est.Role("student", 10, 40, 80),),
        (est.Turn("student", 1.0, 1.0, (50, 100)),),
        sharded=True,
    )
    assert one.least_peak_bytes == one.peak_bytes == 220
    four = est.replace(one, processes=4)
    assert four.least_peak_bytes == 30 + 60 and four.peak_bytes == 30 + 100
    forward = est.replace(four, turns=(est.Turn("student", 1.0, 1.0, (90, 100)),))
    assert forward.least_peak_bytes == 30 + 90  # before there is a gradient


def test_what_is_yet_to_be_fetched_is_not_refused(monkeypatch):
    monkeypatch.setattr(est, "memory_of", lambda device: 10**5)
    est.ensure_memory(run_of("dmd", "student.path=somebody/their-wan"), torch.device("cpu"))


def test_unknown_sizes_are_named():
    with pytest.raises(ValueError, match="student.path=nowhere: no transformer/config.json there"):
        build_on_meta(run_of("dmd", "student.path=nowhere"))


def test_the_table_adds_up():
    estimate = est.Estimate(
        (est.Role("student", 10, 2**30, 2**31, 2**30), est.Role("teacher", 5, 2**29)),
        (
            est.Turn("student", 0.2, 5e12, (2**31, 2**32)),
            est.Turn("fake_score", 1.0, 1e12, (2**31, 0)),
        ),
    )
    assert estimate.state_bytes == 4.5 * 2**30 and estimate.peak_bytes == 8.5 * 2**30
    assert estimate.flops == pytest.approx(2e12)
    assert "4.50 GiB of networks, 8.50 GiB at the peak, 2.000 TFLOP per step" in estimate.table()


def test_sharded_networks_are_divided(monkeypatch):
    """In one process a line says what each of eight would hold."""
    whole, alone = est.estimate(run_of("sft")), est.estimate(run_of("sft", "train.shard=full"))
    assert alone.state_bytes == whole.state_bytes and "sharded" not in whole.table()
    assert "sharded over 8 processes: 0.00 GiB of networks each, at most" in alone.table()
    monkeypatch.setenv("WORLD_SIZE", "4")
    four, each = est.estimate(run_of("sft", "train.shard=full")), est.estimate(run_of("sft"))
    assert (
        4 * four.state_bytes == pytest.approx(whole.state_bytes, abs=4)
        and each.state_bytes == whole.state_bytes
    )
    assert (
        four.peak_bytes == four.state_bytes + four.turns[0].peak
        and "sharded over 4 processes" in four.table()
    )


def test_a_state_in_8_bits_is_a_quarter():
    pytest.importorskip("torchao")
    wide = "student.path=Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    whole, small = (
        roles_on_meta(run_of("sft", wide, f"train.optimizers.student.kind={kind}"), depth=1)[
            0
        ].optimizer
        for kind in ("adamw", "adamw8bit")
    )
    # a scale a block, and little stays in 32 bits
    assert small == pytest.approx(whole / 4 * (1 + 4 / 256), rel=0.01)


def test_turns_of_a_run_without_end_are_counted_in_windows_of_it():
    """max_steps=1e9, as one writes beside max_minutes, used to take a pass over all steps for each
    turn.
    """
    assert list(est.counted_steps(1000)) == list(range(1000))
    steps = list(est.counted_steps(10**9))
    assert (
        len(steps) == est.COUNTED_STEPS
        and steps == sorted(set(steps))
        and steps[0] == 0
        and steps[-1] == 10**9 - 1
    )
    for cycle in (2, 5, 7, 10):
        share = sum(step % cycle == cycle - 1 for step in steps) / len(steps)
        assert share == pytest.approx(1 / cycle, rel=0.02)
    assert sum(step >= 3e8 for step in steps) / len(steps) == pytest.approx(0.7, abs=0.02)
