"""A student that is told where to land: nothing at first, a mean velocity afterwards, the velocity
at span 0 always.
"""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamvid.core.flowmap import total_derivative
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.jump_embedding import JumpEmbedding, add_jump_embedding
from streamvid.models.lora import BLOCK_LAYERS, JUMP_LAYER, LoraConfig, adapt, merged
from streamvid.training.ema import EMA, EMAConfig
from streamvid.weights import load_strictly

TINY = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
T = torch.tensor([900.0, 400.0])
S = torch.tensor([300.0, 0.0])
FRAMES = 4


def plain_student() -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**TINY).eval()


def told_student(trained: bool = True) -> CausalWanTransformer3DModel:
    """With an embedding that, if trained, matters."""
    student = plain_student()
    add_jump_embedding(student)
    if trained:
        torch.manual_seed(1)
        nn.init.normal_(embedding_of(student).linear_2.weight)
    return student


def embedding_of(student: nn.Module) -> JumpEmbedding:
    return student.condition_embedder.jump_embedder


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [2, 4, 4, 4, 4] and text [2, 5, 8]."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, FRAMES, 4, 4, generator=generator)
    return latents, torch.randn(2, 5, 8, generator=generator)


def mean_velocity(student, target=None, timestep=T, **options):
    latents, cond = inputs()
    told = {} if target is None else {"target_timestep": target}
    return student(latents, timestep, cond, **told, **options).sample


# ---- what it says --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "timestep, target",
    [(T, 0.0), (T, S), (T, T), (T[:, None].expand(2, FRAMES), S[:, None].expand(2, FRAMES))],
    ids=["number", "samples", "no span", "frames"],
)
@pytest.mark.parametrize("options", [{}, {"chunk_frames": 2}])
@torch.no_grad()
def test_an_added_embedding_changes_no_bit(timestep, target, options):
    """u(x, t, s) = v(x, t) for every s before it is trained."""
    expected = mean_velocity(plain_student(), None, timestep, **options)
    student = told_student(trained=False)
    assert torch.equal(mean_velocity(student, None, timestep, **options), expected)
    assert torch.equal(mean_velocity(student, target, timestep, **options), expected)


@torch.no_grad()
def test_a_jump_of_no_span_is_the_velocity_whatever_was_trained():
    """Being told s = t and being told nothing are one, bit for bit; any other s is another jump."""
    student = told_student()
    untold = mean_velocity(student)
    assert torch.equal(untold, mean_velocity(plain_student()))
    assert torch.equal(mean_velocity(student, T), untold)
    for target in (0.0, S, T - 1):
        assert (mean_velocity(student, target) - untold).abs().amax() > 1e-4


@torch.no_grad()
def test_a_target_is_a_shift_of_the_time_embedding():
    """By the vector of t - s, for a sample at a time, whose shift a plain network has as a bias."""
    student = told_student()
    told = mean_velocity(student, S)
    for i, span in enumerate((T - S).tolist()):
        plain = plain_student()
        vector = embedding_of(student)(torch.tensor([[span]]))[0, 0]
        plain.condition_embedder.time_embedder.linear_2.bias += vector
        torch.testing.assert_close(told[i], mean_velocity(plain)[i])


@torch.no_grad()
def test_targets_per_sample_and_per_frame_agree():
    student = told_student()
    expected, frames = mean_velocity(student, S), T[:, None].expand(2, FRAMES)
    for told in (
        mean_velocity(student, S[:, None].expand(2, FRAMES)),
        mean_velocity(student, S, timestep=frames),
        mean_velocity(student, S[:, None].expand(2, FRAMES), timestep=frames),
    ):
        torch.testing.assert_close(told, expected)
    assert torch.equal(mean_velocity(student, 300.0), mean_velocity(student, 300 + 0 * S))


@torch.no_grad()
def test_frames_have_targets_of_their_own():
    """In a block-causal pass, a later chunk's target changes that chunk and none before it."""
    student = told_student()
    target = S[:, None].repeat(1, FRAMES)
    before = mean_velocity(student, target, chunk_frames=2)
    target[:, 2:] += 50
    after = mean_velocity(student, target, chunk_frames=2)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert (before[:, :, 2:] - after[:, :, 2:]).abs().amin(dim=(0, 1, 3, 4)).min() > 0


def test_the_span_turns_slowly():
    """From 0 to 1 of time no wave turns by more than 20 radians, so derivatives stay small; the
    features are sin and 1 - cos.
    """
    embedding = JumpEmbedding(16, 16)
    embedding.linear_1.weight.data = torch.eye(16)
    embedding.linear_2.weight.data = torch.eye(16)
    seen = {}
    embedding.linear_1.register_forward_hook(lambda *call: seen.update(waves=call[2]))
    span = torch.linspace(0, 1000, 5001, dtype=torch.float64).unsqueeze(0)
    embedding.double()(span)
    slope = seen["waves"].diff(dim=1).abs().amax() * 5000
    assert 19.5 < slope <= 20
    phase = 0.02 * span[0]
    torch.testing.assert_close(seen["waves"][0, :, 0], phase.sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["waves"][0, :, 8], 1 - phase.cos(), atol=1e-5, rtol=0)


# ---- passes --------------------------------------------------------------------------------------


@torch.no_grad()
def test_cached_passes_equal_the_block_causal_pass():
    """Chunk after chunk, told where to land, over commits that are told nothing: the whole clip
    with clean context, whose frames are not told either.
    """
    student, (noisy, cond) = told_student(), inputs()
    clean = noisy.flip(2) * 0.5
    timestep = torch.tensor([[900.0, 900.0, 300.0, 300.0]]).expand(2, -1)
    target = torch.tensor([[300.0, 300.0, 0.0, 0.0]]).expand(2, -1)
    cache, expected = student.new_cache(2, 4, 4), []
    for start in (0, 2):
        frames = slice(start, start + 2)
        expected.append(
            student(
                noisy[:, :, frames],
                timestep[:, start],
                cond,
                cache=cache,
                target_timestep=target[:, start],
            ).sample
        )
        student.commit(clean[:, :, frames], 40.0, cond, cache)
    options = {"chunk_frames": 2, "clean_context": clean, "context_timestep": 40.0}
    for told in (target, target[:, ::2].repeat_interleave(2, dim=1)):
        actual = student(noisy, timestep, cond, target_timestep=told, **options).sample
        torch.testing.assert_close(actual, torch.cat(expected, dim=2), atol=1e-5, rtol=0)


@torch.no_grad()
def test_kept_keys_equal_the_block_causal_pass():
    """With keys of the told passes themselves, the stream is one pass without clean context."""
    student, (latents, cond) = told_student(), inputs()
    cache, expected = student.new_cache(2, 4, 4), []
    for part in latents.split(2, dim=2):
        output = student(part, T, cond, cache=cache, target_timestep=S, return_kv=True)
        cache.append(output.kv)
        expected.append(output.sample)
    actual = mean_velocity(student, S, chunk_frames=2)
    torch.testing.assert_close(actual, torch.cat(expected, dim=2), atol=1e-5, rtol=0)


# ---- training ------------------------------------------------------------------------------------


def test_the_first_step_moves_it():
    """The zero layer has a gradient at first, the layer below it after one step; a pass that is
    told nothing gives none.
    """
    student = told_student(trained=False)
    embedding = embedding_of(student)
    mean_velocity(student, S).square().sum().backward()
    assert embedding.linear_2.weight.grad.abs().sum() > 0
    torch.optim.SGD(embedding.parameters(), lr=0.1).step()
    mean_velocity(student, S).square().sum().backward()
    assert embedding.linear_1.weight.grad.abs().sum() > 0
    student.zero_grad()
    mean_velocity(student).square().sum().backward()
    assert all(p.grad is None for p in embedding.parameters())


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        student = told_student()
        if checkpointing:
            student.enable_gradient_checkpointing()
        mean_velocity(student, S, chunk_frames=2).square().sum().backward()
        gradients.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_averages_and_checkpoints_hold_it():
    """A network built anew from a plain one takes the state up; a plain one does not do so in
    silence.
    """
    student = told_student()
    ema = EMA(dict(student.named_parameters()), EMAConfig())
    ours = [name for name in ema.state_dict() if "jump_embedder" in name]
    assert len(ours) == 2 and set(ours) <= set(student.state_dict())
    resumed = told_student(trained=False)
    resumed.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(mean_velocity(resumed, S), mean_velocity(student, S))
    with pytest.raises(RuntimeError, match="jump_embedder"):
        plain_student().load_state_dict(student.state_dict())


def test_every_process_begins_with_the_same_values():
    first = told_student(trained=False)
    torch.manual_seed(3)
    second = plain_student()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    add_jump_embedding(second)
    assert torch.equal(torch.get_rng_state(), state)
    a, b = (embedding_of(student).linear_1.weight for student in (first, second))
    assert torch.equal(a, b) and a.std() > 0.1


def test_it_is_made_where_the_network_is():
    """Also without numbers, as shards are put together and costs are counted."""
    student = plain_student().to("meta")
    add_jump_embedding(student)
    with torch.device("meta"):
        made = CausalWanTransformer3DModel.from_config(student.config)
    assert {p.device.type for model in (student, made) for p in model.parameters()} == {"meta"}
    made.load_state_dict(told_student().state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(mean_velocity(made, S), mean_velocity(told_student(), S))


@torch.no_grad()
def test_in_half_precision_it_changes_no_bit_either():
    student = plain_student().bfloat16()
    before = mean_velocity(student)
    add_jump_embedding(student)
    assert embedding_of(student).linear_1.weight.dtype == torch.float32
    assert torch.equal(mean_velocity(student, S), before)


def test_a_network_made_with_every_argument_gets_one():
    """The bug: diffusers' list of arguments left at their defaults is absent where none was."""
    values = {name: x for name, x in plain_student().config.items() if not name.startswith("_")}
    student = CausalWanTransformer3DModel(**values)
    assert "_use_default_values" not in student.config
    add_jump_embedding(student)
    assert student.takes_target and student.config.jump_embedding


def test_one_that_is_there_stays():
    student = told_student()
    embedding = embedding_of(student)
    add_jump_embedding(student)
    assert embedding_of(student) is embedding


def test_an_adapter_learns_it_too():
    """With its layer among the targets; without, it would stay zero for ever, which is refused."""
    with pytest.raises(ValueError, match=f"{JUMP_LAYER}; add it"):
        adapt(told_student(trained=False), LoraConfig(rank=2), "seed")
    config = LoraConfig(rank=2, targets=(*BLOCK_LAYERS, JUMP_LAYER))
    student = adapt(told_student(trained=False), config, "seed").eval()
    before = mean_velocity(student, S).detach()
    assert torch.equal(before, mean_velocity(plain_student()))
    mean_velocity(student, S).square().sum().backward()
    moved = {name: p for name, p in student.named_parameters() if "jump_embedder" in name}
    assert any(p.grad.abs().sum() > 0 for p in moved.values())
    torch.optim.SGD(moved.values(), lr=1.0).step()
    with torch.no_grad():
        told = mean_velocity(student, S)
        assert (told - before).abs().amax() > 1e-4
        torch.testing.assert_close(mean_velocity(merged(student), S), told)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="call models.jump_embedding.add_jump_embedding"):
        mean_velocity(plain_student(), S)
    with pytest.raises(ValueError, match="not to a WanTransformer3DModel"):
        add_jump_embedding(WanTransformer3DModel(**TINY))
    with pytest.raises(ValueError, match="add_jump_embedding before adapt"):
        add_jump_embedding(adapt(plain_student(), LoraConfig(rank=2), "seed"))
    with pytest.raises(ValueError, match=r"expected timesteps \[2\] or \[2, 4\], got \[3\]"):
        mean_velocity(told_student(), torch.zeros(3))


# ---- folders -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_folder_holds_it(tmp_path):
    """Also where it is opened in half precision, where it stays float32 like the time embedder."""
    student = told_student()
    student.save_pretrained(tmp_path)
    loaded = load_strictly(CausalWanTransformer3DModel, tmp_path).eval()
    assert loaded.takes_target and loaded.config.jump_embedding
    assert torch.equal(mean_velocity(loaded, S), mean_velocity(student, S))
    half = load_strictly(CausalWanTransformer3DModel, tmp_path, torch.bfloat16)
    assert embedding_of(half).linear_1.weight.dtype == torch.float32
    torch.testing.assert_close(
        mean_velocity(half, S).float(), mean_velocity(student, S), atol=0.05, rtol=0.05
    )
    rebuilt = CausalWanTransformer3DModel.from_config(student.config)
    rebuilt.load_state_dict(student.state_dict())
    assert torch.equal(mean_velocity(rebuilt.eval(), S), mean_velocity(student, S))


@torch.no_grad()
def test_diffusers_gives_the_velocity(tmp_path):
    """It leaves the embedding out, which is being told nothing."""
    student = told_student()
    student.save_pretrained(tmp_path)
    theirs, info = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all("jump_embedder" in name for name in info["unexpected_keys"])
    latents, cond = inputs()
    torch.testing.assert_close(theirs(latents, T, cond).sample, mean_velocity(student))


def test_a_folder_without_it_does_not_name_it(tmp_path):
    """Its keys are diffusers' own, and nothing is left over or missing when diffusers opens it."""
    student = plain_student()
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.keys() == json.loads(WanTransformer3DModel(**TINY).to_json_string()).keys()
    _, info = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not load_strictly(CausalWanTransformer3DModel, tmp_path).takes_target


# ---- derivatives by time -------------------------------------------------------------------------


def flow_map(student, cond, **options):
    """``u(x_t, t, s)`` with times in [0, 1], as ``core.flowmap`` calls it."""

    def u(x_t, t, s):
        return student(x_t, 1000 * t, cond, target_timestep=1000 * s, **options).sample

    return u


@pytest.mark.parametrize("options", [{}, {"chunk_frames": 2}])
def test_a_finite_difference_is_the_forward_derivative(monkeypatch, options):
    """Forward differentiation goes through the student with the math attention; ``mode="fd"``
    agrees to second order of h. In float64, which layers that ask for float32 are kept in here.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    student = told_student().double()
    x_t, cond = (x.double() for x in inputs())
    t, s = T.double() / 1000, S.double() / 1000
    v = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3)).double()
    with sdpa_kernel(SDPBackend.MATH):
        u = flow_map(student, cond, **options)
        value, exact = total_derivative(u, x_t, t, s, v, mode="jvp")
        errors = []
        for h in (1e-4, 5e-5):
            same, approximate = total_derivative(u, x_t, t, s, v, mode="fd", h=h)
            errors.append((approximate - exact).norm() / exact.norm())
    torch.testing.assert_close(value, same)
    assert errors[0] < 1e-2 and 3.8 < errors[0] / errors[1] < 4.2
