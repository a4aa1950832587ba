"""Adapters: three roles on one set of weights, each exact, each alone with what it owns."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from streamvid.experiment.build import build_trainer
from streamvid.experiment.config import load_run
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.lora import (
    LORA_FILE,
    LoraConfig,
    adapt,
    base_parameters,
    load_adapter,
    merged,
    save_adapter,
    share_weights,
)
from streamvid.models.video_discriminator import VideoDiscriminator
from streamvid.students.folder import TINY_TEACHER, load_student, load_transformer
from tests.fakes import TINY_WAN

pytest.importorskip("peft")

RANK_4 = LoraConfig(rank=4)
RUNS = Path(__file__).parents[2] / "configs" / "run"


def wan(cls=CausalWanTransformer3DModel, seed=0):
    torch.manual_seed(seed)
    return cls(**TINY_WAN)


def moved(role, seed=1, size=0.3):
    """An adapted network whose adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return role


def inputs(seed=5, frames=2):
    generator = torch.Generator().manual_seed(seed)
    x, cond = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, frames, 4, 4), (2, 3, 8))
    )
    return x, torch.tensor([300.0, 700.0]), cond


def velocity(network, **options):
    return network(*inputs(), return_dict=False, **options)[0]


def addresses(network):
    return {name: parameter.data_ptr() for name, parameter in base_parameters(network).items()}


@pytest.mark.parametrize("cls", [CausalWanTransformer3DModel, WanTransformer3DModel])
def test_three_roles_are_bitwise_what_they_would_be_alone(cls):
    """Neither a new adapter nor a trained one of another role changes what a role computes."""
    alone = velocity(wan(cls))
    base = wan(cls)
    student, fake_score = adapt(base, RANK_4, "student"), adapt(base, RANK_4, "fake_score")
    assert all(torch.equal(velocity(role), alone) for role in (base, student, fake_score))

    moved(student)
    expected = velocity(student)
    assert not torch.equal(expected, alone)
    assert torch.equal(velocity(base), alone) and torch.equal(velocity(fake_score), alone)
    moved(fake_score, seed=2)
    assert torch.equal(velocity(student), expected) and torch.equal(velocity(base), alone)
    assert torch.equal(expected, velocity(moved(adapt(wan(cls), RANK_4))))


def test_the_weights_are_held_once_and_belong_to_nobody():
    base = wan()
    student, fake_score = adapt(base, RANK_4, "student"), adapt(base, RANK_4, "fake_score")
    assert addresses(base) == addresses(student) == addresses(fake_score)
    for role in (student, fake_score):
        assert list(role.state_dict()) == [name for name, _ in role.named_parameters()]
        assert all("lora_" in name and p.requires_grad for name, p in role.named_parameters())
    assert not set(map(id, student.parameters())) & set(map(id, fake_score.parameters()))
    student.requires_grad_(False).requires_grad_(True)
    assert not any(p.requires_grad for p in base.parameters())


def test_moving_one_role_keeps_the_weights_shared():
    """`.to` puts new memory into the same parameters; a copy for each role would show here."""
    base = wan()
    roles = [adapt(base, RANK_4, name) for name in ("student", "fake_score")]
    for network in (roles[0], base, roles[1]):
        network.to(torch.float64)
    assert addresses(base) == addresses(roles[0]) == addresses(roles[1])
    assert all(p.dtype == torch.float64 for p in base.parameters())


def gradients(checkpointing, disturb):
    base = wan()
    student, other = moved(adapt(base, RANK_4)), moved(adapt(base, RANK_4), seed=2)
    if checkpointing:
        student.enable_gradient_checkpointing()
    loss = velocity(student).square().mean()
    if disturb:
        velocity(other).sum().backward()
        velocity(base)
    loss.backward()
    assert all(p.grad is None for p in base.parameters())
    return {name: p.grad for name, p in student.named_parameters()}


def test_recomputation_sees_the_adapter_of_its_own_forward():
    """Bug: with one module whose adapter is switched, checkpointing recomputes with that of the
    last call.
    """
    plain, recomputed = gradients(False, False), gradients(True, True)
    assert all(
        plain[name].abs().sum() > 0 and torch.equal(plain[name], recomputed[name]) for name in plain
    )


def test_gradients_are_those_of_the_merged_matrix():
    """dL/dB = alpha / r dL/dW A^T, with dL/dW from an ordinary network of the merged weights."""
    config = LoraConfig(rank=4, alpha=2.0)
    student = moved(adapt(wan(), config))
    velocity(student).square().mean().backward()
    plain = merged(student).requires_grad_(True)
    velocity(plain).square().mean().backward()
    name = "blocks.1.attn1.to_v"
    a, b = (student.get_parameter(f"{name}.lora_{matrix}.default.weight") for matrix in "AB")
    dense = plain.get_parameter(f"{name}.weight").grad
    torch.testing.assert_close(b.grad, 0.5 * dense @ a.T, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(a.grad, 0.5 * b.T @ dense, rtol=1e-3, atol=1e-6)


def test_a_cached_rollout_of_the_student_uses_its_adapter():
    """`commit` and `new_cache` are methods of the network itself, which a wrapper of calls would
    pass by.
    """
    student, (x, t, cond) = moved(adapt(wan(), RANK_4)), inputs()
    values = []
    for network in (student, merged(student)):
        cache = network.new_cache(2, 4, 4)
        network.commit(x, 0.0, cond, cache)
        values.append(network(x, t, cond, cache=cache).sample)
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_a_deep_copy_has_its_own_adapter_on_the_same_weights():
    """What adversarial distillation does for its old policy and for the trunk of its
    discriminator.
    """
    student = moved(adapt(wan(), RANK_4))
    twin, before = copy.deepcopy(student), velocity(student)
    assert torch.equal(velocity(twin), before) and addresses(twin) == addresses(student)
    moved(student, seed=9)
    assert torch.equal(velocity(twin), before)

    discriminator = VideoDiscriminator(copy.deepcopy(student))
    trained = [name for name, p in discriminator.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name or name.startswith("heads.") for name in trained)
    assert all("lora_" in name or name.startswith("heads.") for name in discriminator.state_dict())
    assert set(trained) <= set(discriminator.state_dict())


def test_bf16_weights_get_float32_adapters():
    base = wan().to(torch.bfloat16)
    student = moved(adapt(base, RANK_4), size=0.05)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    out = velocity(student)
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and all(
        p.grad.dtype == torch.float32 for p in student.parameters()
    )


def test_the_first_values_are_keyed():
    """Processes and resumed runs start alike, whatever was drawn before, and draw nothing from the
    global generator.
    """
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = adapt(wan(), RANK_4, 0, "student").state_dict()
    torch.set_rng_state(state)
    torch.rand(3)
    again, other = (
        adapt(wan(), RANK_4, 0, name).state_dict() for name in ("student", "fake_score")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("cls", [CausalWanTransformer3DModel, WanTransformer3DModel])
def test_the_export_is_an_ordinary_folder_that_diffusers_opens(tmp_path, cls):
    student = moved(adapt(wan(cls), LoraConfig(rank=4, alpha=2.0)))
    student.save_pretrained(tmp_path)
    opened = WanTransformer3DModel.from_pretrained(tmp_path)
    assert set(opened.state_dict()) == set(wan(cls).state_dict())
    torch.testing.assert_close(velocity(opened), velocity(student), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(velocity(opened), velocity(wan(cls)), atol=1e-2)
    # only what has an adapter is made anew
    assert merged(student).proj_out.weight is student.proj_out.weight
    frozen, fresh = base_parameters(student), dict(wan(cls).named_parameters())
    # by merging
    assert frozen.keys() == fresh.keys() and all(
        torch.equal(frozen[name], fresh[name]) for name in fresh
    )


def test_diffusers_loads_the_adapter_onto_the_base(tmp_path):
    """The file that `load_lora_weights` of a Wan pipeline takes; alpha travels in its header."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    base = wan(WanTransformer3DModel)
    student = moved(adapt(base, LoraConfig(rank=4, alpha=2.0)))
    save_adapter(student, tmp_path / "lora")
    parts = dict(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    pipeline = WanPipeline(transformer=wan(WanTransformer3DModel), **parts)
    pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(
        velocity(pipeline.transformer), velocity(student), rtol=1e-5, atol=1e-6
    )


def test_an_adapter_goes_to_disk_and_back(tmp_path):
    student = moved(adapt(wan(), RANK_4))
    save_adapter(student, tmp_path / "lora")
    names = set(load_file(tmp_path / "lora" / LORA_FILE))
    assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in names and len(names) == 2 * 2 * 10
    again = adapt(wan(), LoraConfig(rank=4, path=str(tmp_path / "lora")))
    assert torch.equal(velocity(again), velocity(student))


def test_an_adapter_of_another_network_is_one_line(tmp_path):
    save_adapter(adapt(wan(), RANK_4), tmp_path / "lora")
    torch.manual_seed(0)
    wider = CausalWanTransformer3DModel(**{**TINY_WAN, "num_attention_heads": 3})
    deeper = CausalWanTransformer3DModel(**{**TINY_WAN, "num_layers": 3})
    others = [adapt(wider, RANK_4), adapt(deeper, RANK_4)]
    others += [adapt(wan(), LoraConfig(rank=8)), adapt(wan(), LoraConfig(rank=4, alpha=8.0))]
    for role in others:
        before = {name: tensor.clone() for name, tensor in role.state_dict().items()}
        with pytest.raises(ValueError, match="adapter of another|alpha") as error:
            load_adapter(role, tmp_path / "lora")
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
        assert all(torch.equal(before[name], tensor) for name, tensor in role.state_dict().items())


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rank=-1), "rank"),
        (dict(rank=0, alpha=4.0), "lora.rank=0"),
        (dict(rank=4, alpha=0.0), "alpha"),
        (dict(rank=4, targets=()), "targets"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_a_target_that_is_not_there_is_named():
    """peft adapts what it finds and says nothing of the rest."""
    with pytest.raises(ValueError, match="to_query"):
        adapt(wan(), LoraConfig(rank=4, targets=("to_k", "to_query")))


def test_a_teacher_stands_on_the_students_weights():
    student, teacher = moved(adapt(wan(), RANK_4)), wan(WanTransformer3DModel)
    teacher.load_state_dict(wan().state_dict())
    before = velocity(teacher)
    share_weights(teacher, student)
    assert torch.equal(velocity(teacher), before) and addresses(teacher) == addresses(student)
    for other in (wan(seed=3), wan().to(torch.bfloat16)):
        with pytest.raises(ValueError, match="differs"):
            share_weights(other, student)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A teacher's folder with a very small transformer, nothing of it zero, for the shipped codec
    and texts.
    """
    folder = tmp_path_factory.mktemp("teacher")
    shutil.copytree(TINY_TEACHER / "scheduler", folder / "scheduler")
    sizes = {
        **TINY_WAN,
        "num_attention_heads": 1,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 64,
    }
    torch.manual_seed(0)
    WanTransformer3DModel(**sizes).save_pretrained(folder / "transformer")
    return folder


def trainer_of(run, folder, checkpoint, *overrides):
    quick = [
        f"train.output_dir={folder}",
        "train.name=run",
        "train.batch_size=2",
        "train.log_every=1",
        "train.max_steps=2",
        f"student.path={checkpoint}",
        f"teacher.path={checkpoint}",
        "student.lora.rank=4",
        "data.num_prompts=4",
    ]
    return build_trainer(load_run(RUNS / f"{run}.yaml", [*quick, *overrides]), progress=False)


DMD = ("rollout.num_chunks=2", "options.fake_updates_per_student=1", "options.student_start_step=0")


def test_dmd_holds_the_weights_of_three_roles_once_and_exports(tmp_path, checkpoint):
    trainer = trainer_of("tiny_dmd", tmp_path, checkpoint, *DMD)
    student, fake_score = (trainer.learners[name].network for name in ("student", "fake_score"))
    teacher = trainer.method.teacher.transformer
    assert addresses(student) == addresses(fake_score) == addresses(teacher)
    before = {name: p.clone() for name, p in base_parameters(teacher).items()}

    folder = trainer.train() / "student"
    assert all(torch.equal(before[name], p) for name, p in base_parameters(teacher).items())
    for role in (student, fake_score):
        assert all(p.abs().sum() > 0 for name, p in role.named_parameters() if "lora_B" in name)
    held = load_file(tmp_path / "run" / "checkpoints" / "step-0000002" / "student.safetensors")
    assert set(held) == set(student.state_dict()) and all("lora_" in name for name in held)

    x, t, cond = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, 64)
    with trainer.ema_weights("student"), torch.no_grad():
        expected = student(x, t, cond, chunk_frames=3).sample
    again = adapt(load_transformer(checkpoint), LoraConfig(rank=4, path=str(folder / "lora")))
    for opened in (load_student(folder).transformer, again):
        with torch.no_grad():
            torch.testing.assert_close(
                opened(x, t, cond, chunk_frames=3).sample, expected, rtol=1e-4, atol=1e-5
            )


def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, checkpoint):
    dmd = (*DMD, "train.save_every=1")
    whole = trainer_of("tiny_dmd", tmp_path / "whole", checkpoint, *dmd, "train.max_steps=3")
    whole.train()
    trainer_of("tiny_dmd", tmp_path / "parts", checkpoint, *dmd, "train.max_steps=1").train()
    parts = trainer_of("tiny_dmd", tmp_path / "parts", checkpoint, *dmd, "train.max_steps=3")
    parts.train()
    for file in (
        "student",
        "student.ema",
        "student.optimizer",
        "fake_score",
        "fake_score.optimizer",
    ):
        place = Path("run", "checkpoints", "step-0000003", f"{file}.safetensors")
        one, other = (load_file(tmp_path / part / place) for part in ("whole", "parts"))
        assert one.keys() == other.keys() and all(
            torch.equal(one[name], other[name]) for name in one
        )


def test_the_fake_score_can_be_a_whole_network(tmp_path, checkpoint):
    trainer = trainer_of("tiny_dmd", tmp_path, checkpoint, *DMD, "fake_score.lora_rank=0")
    fake_score = trainer.learners["fake_score"].network
    assert type(fake_score) is WanTransformer3DModel and all(
        p.requires_grad for p in fake_score.parameters()
    )
    assert addresses(trainer.learners["student"].network) == addresses(
        trainer.method.teacher.transformer
    )
    assert not set(addresses(fake_score).values()) & set(
        addresses(trainer.method.teacher.transformer).values()
    )


def test_a_student_of_another_start_has_weights_of_its_own(tmp_path, checkpoint):
    start = tmp_path / "start"
    torch.manual_seed(3)
    WanTransformer3DModel.from_config(load_transformer(checkpoint).config).save_pretrained(
        start / "transformer"
    )
    trainer = trainer_of("tiny_dmd", tmp_path, checkpoint, *DMD, f"student.path={start}")
    student, fake_score = (
        addresses(trainer.learners[name].network) for name in ("student", "fake_score")
    )
    assert fake_score == addresses(trainer.method.teacher.transformer)
    assert not set(student.values()) & set(fake_score.values())


@pytest.mark.parametrize(
    "run, options",
    [
        ("tiny_asd", (*DMD, "stream.num_steps=2", "train.gradient_checkpointing=true")),
        ("tiny_diagonal", DMD),
        ("tiny_afd", ("options.student_start_step=0",)),
        ("tiny_start", ("train.optimizers.student.kind=adamw",)),
        ("tiny_dmd", (*DMD, "student.lora.dtype=bf16", "teacher.dtype=bf16")),
    ],
)
def test_every_method_trains_adapters_alone(tmp_path, checkpoint, run, options):
    world = [f"data.path={tmp_path / 'world.safetensors'}", "data.world.num_clips=2"]
    frames = {"tiny_afd": 9, "tiny_start": 57}.get(run)
    options = [*options, *(world + [f"data.world.num_frames={frames}"] if frames else [])]
    trainer = trainer_of(run, tmp_path, checkpoint, *options)
    student = trainer.learners["student"].network
    frozen = {name: p.clone() for name, p in base_parameters(student).items()}
    adapter = {name: p.clone() for name, p in student.named_parameters()}
    trainer.train()
    assert all(torch.equal(frozen[name], p) for name, p in base_parameters(student).items())
    assert all(
        not torch.equal(adapter[name], p)
        for name, p in student.named_parameters()
        if "lora_B" in name
    )


@pytest.mark.parametrize(
    "run, override, message",
    [
        ("tiny_dmd", "student.path=null", "student.path"),
        ("tiny_dmd", "fake_score.lora_rank=-1", "fake_score.lora_rank"),
        ("tiny_start", "train.optimizers.student.kind=muon", "muon"),
        ("tiny_afd", "fake_score.lora_rank=2", "no fake score"),
        ("tiny_asd", "teacher.offload=true", "offload"),
    ],
)
def test_adapters_on_nothing_are_refused(tmp_path, checkpoint, run, override, message):
    clips = run in ("tiny_start", "tiny_afd")
    world = (
        ["data.world.num_clips=2", "data.world.num_frames=9", f"data.path={tmp_path / 'w.st'}"]
        if clips
        else []
    )
    with pytest.raises(ValueError, match=message):
        trainer_of(run, tmp_path, checkpoint, *world, override)
