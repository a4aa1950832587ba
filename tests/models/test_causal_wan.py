"""Properties of the student. Legend: B batch, C channels, T latent frames, H W latent size."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.kv_cache import StreamKVCache
from streamvid.models.rope import rotary_table

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN_CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=24,
    in_channels=16,
    out_channels=16,
    text_dim=32,
    freq_dim=32,
    ffn_dim=192,
    num_layers=3,
)
TIMESTEPS = (1000.0, 937.5, 2500 / 3, 625.0)
HEIGHT = WIDTH = 8


@pytest.fixture(scope="module")
def reference() -> WanTransformer3DModel:
    """diffusers' model with the golden weights."""
    model = WanTransformer3DModel(**GOLDEN_CONFIG)
    model.load_state_dict(load_file(FIXTURES / "tiny_wan.safetensors"))
    return model.eval()


@pytest.fixture
def student() -> CausalWanTransformer3DModel:
    """The student with the golden weights."""
    model = CausalWanTransformer3DModel(**GOLDEN_CONFIG)
    model.load_state_dict(load_file(FIXTURES / "tiny_wan.safetensors"))
    return model.eval()


def inputs(
    frames: int, batch: int = 1, height: int = HEIGHT, width: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B, 16, T, H, W] and text [B, 5, 32], the same at every call."""
    generator = torch.Generator().manual_seed(frames)
    latents = torch.randn(batch, 16, frames, height, width, generator=generator)
    return latents, torch.randn(batch, 5, 32, generator=generator)


def minimal_student() -> CausalWanTransformer3DModel:
    """Two blocks of one head: fast enough to stream for thousands of chunks."""
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=1, attention_head_dim=12, ffn_dim=16, num_layers=2)
    return CausalWanTransformer3DModel(
        **{**GOLDEN_CONFIG, **sizes, "in_channels": 2, "out_channels": 2}
    ).eval()


def stream(
    student: CausalWanTransformer3DModel,
    latents: torch.Tensor,
    cond: torch.Tensor,
    chunk: int,
    timestep: float,
) -> torch.Tensor:
    """Each chunk denoised over the clean commits of the ones before it: [B, 16, T, H, W]."""
    cache = student.new_cache(len(latents), *latents.shape[-2:])
    outputs = []
    for part in latents.split(chunk, dim=2):
        outputs.append(student(part, timestep, cond, cache=cache).sample)
        student.commit(part, timestep, cond, cache)
    return torch.cat(outputs, dim=2)


# ---- Numbers of an independent implementation ----------------------------------------------------


@pytest.mark.parametrize(
    "name, window",
    [("full_attention", {}), ("window6_sink1", {"window_frames": 6, "sink_frames": 1})],
)
@torch.no_grad()
def test_golden(student, name, window):
    """Cached passes equal the reference tensors, with all frames kept and with a window and a
    sink.
    """
    golden = load_file(FIXTURES / f"{name}.safetensors")
    cache = student.new_cache(1, HEIGHT, WIDTH, **window)
    chunks = zip(golden["x"].split(3, dim=2), golden["clean"].split(3, dim=2), strict=True)
    for c, (noisy, clean) in enumerate(chunks):
        for step in (0, 1):
            timestep = torch.tensor([TIMESTEPS[(c + step) % 4]])
            sample = student(noisy, timestep, golden["ctx"], cache=cache).sample
            torch.testing.assert_close(sample, golden["out"][2 * c + step], atol=1e-5, rtol=0)
        student.commit(clean, torch.zeros(1), golden["ctx"], cache)


@pytest.mark.parametrize(
    "batch, frames, height, width", [(1, 1, 8, 8), (2, 3, 8, 8), (1, 4, 6, 10)]
)
@torch.no_grad()
def test_bidirectional_pass_equals_diffusers(student, reference, batch, frames, height, width):
    """Without cache and chunks the student is diffusers' Wan, for any shape and a timestep per
    sample.
    """
    latents, cond = inputs(frames, batch, height, width)
    timestep = torch.linspace(1000, 250, batch)
    expected = reference(latents, timestep, cond).sample
    torch.testing.assert_close(student(latents, timestep, cond).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_frame_timesteps_equal_token_timesteps_of_diffusers(student, reference):
    """A timestep per frame is diffusers' timestep per token, repeated over the frame's tokens."""
    latents, cond = inputs(3, batch=2)
    timestep = torch.tensor([[1000.0, 700.0, 10.5], [300.0, 0.0, 625.0]])
    expected = reference(latents, timestep.repeat_interleave(16, dim=1), cond).sample
    torch.testing.assert_close(student(latents, timestep, cond).sample, expected, atol=1e-5, rtol=0)


# ---- Causality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames, chunk", [(4, 1), (6, 3), (16, 8)])
@torch.no_grad()
def test_cached_pass_equals_block_causal_pass(student, frames, chunk, batch):
    """Chunk after chunk over a cache is one block-causal pass, also where a chunk is 128 tokens.

    The bug: padding to a multiple of 128 cut with ``[:, :, :-padding]`` leaves nothing when padding
    is 0.
    """
    latents, cond = inputs(frames, batch)
    expected = student(latents, 500.0, cond, chunk_frames=chunk).sample
    torch.testing.assert_close(
        stream(student, latents, cond, chunk, 500.0), expected, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_one_chunk_is_the_bidirectional_pass(student):
    """Block-causal over a single chunk, and over an empty cache, is bidirectional: bit for bit."""
    latents, cond = inputs(3)
    expected = student(latents, 500.0, cond).sample
    cache = student.new_cache(1, HEIGHT, WIDTH)
    assert torch.equal(student(latents, 500.0, cond, chunk_frames=3).sample, expected)
    assert torch.equal(student(latents, 500.0, cond, cache=cache).sample, expected)


@pytest.mark.parametrize("frame", [0, 3, 5])
@torch.no_grad()
def test_the_past_does_not_depend_on_the_future(student, frame):
    """A change in frame k leaves the chunks before its own bit-equal and changes its own chunk."""
    latents, cond = inputs(6)
    changed = latents.clone()
    changed[:, :, frame] += 1
    before, after = (student(x, 500.0, cond, chunk_frames=3).sample for x in (latents, changed))
    start = frame // 3 * 3
    assert torch.equal(before[:, :, :start], after[:, :, :start])
    assert not torch.equal(before[:, :, start : start + 3], after[:, :, start : start + 3])


@pytest.mark.parametrize("context_timestep", [0.0, 40.0])
@torch.no_grad()
def test_teacher_forcing_equals_streaming_over_clean_context(student, context_timestep):
    """The teacher-forced pass is the stream that commits the data, with a timestep per frame."""
    noisy, cond = inputs(9, batch=2)
    clean = noisy.flip(2) * 0.5
    timestep = torch.tensor([[900.0] * 3 + [300.0] * 3 + [20.0, 30.0, 40.0], [100.0] * 9])
    cache = student.new_cache(2, HEIGHT, WIDTH)
    expected = []
    for c in range(3):
        frames = slice(3 * c, 3 * c + 3)
        expected.append(student(noisy[:, :, frames], timestep[:, frames], cond, cache=cache).sample)
        student.commit(clean[:, :, frames], context_timestep, cond, cache)
    actual = student(
        noisy,
        timestep,
        cond,
        chunk_frames=3,
        clean_context=clean,
        context_timestep=context_timestep,
    ).sample
    torch.testing.assert_close(actual, torch.cat(expected, dim=2), atol=1e-5, rtol=0)


def test_teacher_forcing_gradient_reaches_clean_past_and_own_noise(student):
    """A loss on chunk 1 gives gradient to clean chunk 0 and noisy chunk 1, and to nothing else."""
    noisy, cond = (x.requires_grad_() for x in inputs(6))
    clean = noisy.detach().flip(2).requires_grad_()
    sample = student(noisy, 500.0, cond, chunk_frames=3, clean_context=clean).sample
    sample[:, :, 3:].square().sum().backward()
    reached = [x.grad.flatten(3).abs().sum((0, 1, 3)) > 0 for x in (clean, noisy)]
    assert [x.tolist() for x in reached] == [[True] * 3 + [False] * 3, [False] * 3 + [True] * 3]


@torch.no_grad()
def test_joint_chunks_over_a_cache_equal_chunk_by_chunk(student):
    """Two chunks at different levels in one block-causal pass over a cache are two passes that
    reuse keys.
    """
    latents, cond = inputs(9)
    timestep = torch.tensor([[300.0] * 3 + [800.0] * 3])
    cache = student.new_cache(1, HEIGHT, WIDTH)
    student.commit(latents[:, :, :3], 0.0, cond, cache)
    joint = student(latents[:, :, 3:], timestep, cond, cache=cache, chunk_frames=3).sample
    for c in (1, 2):
        frames = slice(3 * c, 3 * c + 3)
        output = student(
            latents[:, :, frames], timestep[:, 3 * c - 3], cond, cache=cache, return_kv=True
        )
        cache.append(output.kv)
        torch.testing.assert_close(joint[:, :, 3 * c - 3 : 3 * c], output.sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_joint_frames_see_each_other(student):
    """Without ``chunk_frames`` the frames given over a cache attend to each other, later ones
    included.
    """
    latents, cond = inputs(6)
    cache = student.new_cache(1, HEIGHT, WIDTH)
    student.commit(latents[:, :, :3], 0.0, cond, cache)
    changed = latents[:, :, 3:].clone()
    changed[:, :, 2] += 1
    first = [
        student(x, 500.0, cond, cache=cache).sample[:, :, 0] for x in (latents[:, :, 3:], changed)
    ]
    assert not torch.equal(*first)


# ---- The cache under passes, gradients and long streams ------------------------------------------


def stored(cache: StreamKVCache) -> list[torch.Tensor]:
    """Copies of the keys and values of all layers."""
    return [x.clone() for pair in cache._layers for x in pair]


@pytest.mark.parametrize("grad", [False, True])
def test_denoising_never_changes_a_cache(student, grad):
    """Passes, with gradient or without, leave frames, keys and values as they were."""
    latents, cond = inputs(6)
    cache = student.new_cache(1, HEIGHT, WIDTH)
    student.commit(latents[:, :, :3], 0.0, cond, cache)
    before, tensors = stored(cache), [x for pair in cache._layers for x in pair]
    with torch.set_grad_enabled(grad):
        for timestep in TIMESTEPS:
            student(latents[:, :, 3:], timestep, cond, cache=cache, return_kv=True)
    after = [x for pair in cache._layers for x in pair]
    assert cache.num_committed_frames == 3
    assert all(x is y for x, y in zip(tensors, after, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@torch.no_grad()
def test_reuse_commits_the_keys_of_the_pass(student):
    """Appending a pass's own keys is a commit at that pass's timestep, without another forward."""
    latents, cond = inputs(3)
    caches = [student.new_cache(1, HEIGHT, WIDTH) for _ in range(2)]
    caches[0].append(student(latents, 400.0, cond, cache=caches[0], return_kv=True).kv)
    student.commit(latents, 400.0, cond, caches[1])
    assert all(torch.equal(x, y) for x, y in zip(stored(caches[0]), stored(caches[1]), strict=True))


def test_no_gradient_crosses_chunks(student):
    """A loss on chunk 1 reaches neither chunk 0's latents nor, through the cache, chunk 0's use of
    the weights.

    The bug: keys written into a cache with their graph carry chunk 1's loss into chunk 0's noisy
    pass.
    """
    latents, cond = inputs(6)
    gradients = []
    for grad in (True, False):
        student.zero_grad()
        first = latents[:, :, :3].clone().requires_grad_()
        cache = student.new_cache(1, HEIGHT, WIDTH)
        with torch.set_grad_enabled(grad):
            cache.append(student(first, 500.0, cond, cache=cache, return_kv=True).kv)
        assert not any(x.requires_grad for pair in cache._layers for x in pair)
        student(latents[:, :, 3:], 500.0, cond, cache=cache).sample.square().sum().backward()
        assert first.grad is None
        gradients.append([p.grad.clone() for p in student.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_text_kept_by_a_stream_is_not_read_under_gradient(student):
    """The bug: text keys filled by a pass without gradient and reused with gradient train no text
    weights.
    """
    latents, cond = inputs(3)
    cache = student.new_cache(1, HEIGHT, WIDTH)
    student.commit(latents, 0.0, cond, cache)
    student(latents, 500.0, cond, cache=cache).sample.square().sum().backward()
    assert all(block.attn2.to_k.weight.grad.abs().sum() > 0 for block in student.blocks)
    assert student.condition_embedder.text_embedder.linear_1.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_new_prompt_replaces_the_kept_text(student):
    """A stream whose prompt changes, by another tensor or in place, follows the new prompt."""
    latents, cond = inputs(3)
    cache = student.new_cache(1, HEIGHT, WIDTH)
    for given in (cond, cond + 1, cond.mul_(2)):
        expected = student(latents, 500.0, given).sample
        for _ in range(2):
            assert torch.equal(student(latents, 500.0, given, cache=cache).sample, expected)


@pytest.mark.parametrize("window", [{}, {"window_frames": 6, "sink_frames": 1}])
def test_gradients_are_equal_with_checkpointing(student, window):
    """Activation checkpointing through cached passes, commits in between, changes no gradient at
    all.

    The bug: a cache that a checkpointed block writes to is recomputed from its later state.
    """
    latents, cond = inputs(9)
    gradients = []
    for checkpointing in (False, True):
        (
            student.enable_gradient_checkpointing()
            if checkpointing
            else student.disable_gradient_checkpointing()
        )
        student.zero_grad()
        cache, loss = student.new_cache(1, HEIGHT, WIDTH, **window), 0.0
        for part in latents.split(3, dim=2):
            loss = loss + student(part, 500.0, cond, cache=cache).sample.square().mean()
            student.commit(part, 0.0, cond, cache)
        loss.backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@torch.no_grad()
def test_endless_stream_keeps_memory_and_positions():
    """2,000 chunks: memory stays flat, positions stay in the trained range, the output stays
    finite.
    """
    student = minimal_student()
    latents, cond = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 32)
    cache = student.new_cache(
        1, 2, 2, window_frames=4, sink_frames=1, positions="window", max_trained_frames=6
    )
    memory, positions = set(), set()
    for chunk in range(2000):
        if chunk >= 4:
            memory.add(cache.memory_bytes())
        positions.update(sum(cache.frame_positions(1), ()))
        output = student(latents, 500.0, cond, cache=cache, return_kv=True)
        cache.append(output.kv)
    assert (len(memory), positions, cache.num_committed_frames) == (1, set(range(6)), 2000)
    assert output.sample.isfinite().all()


@torch.no_grad()
def test_output_depends_on_window_and_sink_only():
    """Streams of different length and history, with the same frames in sink and window, go on
    bit-equal.

    Under absolute positions they don't: there the sink's distance grows without end.
    """
    student = minimal_student()
    latents, cond = torch.randn(1, 2, 2, 2, 2), torch.randn(1, 2, 32)
    sink, recent = (frames_kv(student, frames, seed) for frames, seed in ((1, 1), (5, 2)))
    outputs = {}
    for positions in ("window", "absolute"):
        for evicted in (7, 30):
            cache = student.new_cache(1, 2, 2, window_frames=6, sink_frames=1, positions=positions)
            for kv in (sink, frames_kv(student, evicted, seed=evicted), recent):
                cache.append(kv)
            outputs[positions, evicted] = student(latents, 500.0, cond, cache=cache).sample
    assert torch.equal(outputs["window", 7], outputs["window", 30])
    assert not torch.allclose(outputs["absolute", 7], outputs["absolute", 30], atol=1e-5)


def frames_kv(student: CausalWanTransformer3DModel, frames: int, seed: int) -> tuple:
    """Random keys and values of frames of one token, for ``cache.append``."""
    generator = torch.Generator().manual_seed(seed)
    config = student.config
    shape = (1, frames, 1, config.num_attention_heads, config.attention_head_dim)
    draw = lambda: torch.randn(shape, generator=generator)
    return tuple((draw(), draw()) for _ in range(config.num_layers))


# ---- Folders, precision, compilation, errors -----------------------------------------------------


class Warnings(logging.Handler):
    """Collects what diffusers warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def public_config(model: torch.nn.Module) -> dict:
    """A model's configuration as its folder has it, without diffusers' own entries."""
    return {
        key: value for key, value in json.loads(model.to_json_string()).items() if key[0] != "_"
    }


@pytest.mark.parametrize("to_diffusers", [True, False])
@torch.no_grad()
def test_folders_are_exchanged_with_diffusers(student, reference, tmp_path, to_diffusers):
    """A student's folder opens in diffusers and the reverse: every key, no warning, the same
    output.
    """
    source, target = (
        (student, WanTransformer3DModel)
        if to_diffusers
        else (reference, CausalWanTransformer3DModel)
    )
    source.save_pretrained(tmp_path)
    warnings = Warnings()
    logging.getLogger("diffusers").addHandler(warnings)
    loaded, info = target.from_pretrained(tmp_path, output_loading_info=True)
    logging.getLogger("diffusers").removeHandler(warnings)
    assert not warnings.messages
    assert not any(info.values()), info
    assert (
        json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    )
    assert public_config(loaded) == public_config(source)
    latents, cond = inputs(3)
    timestep = torch.tensor([700.0])
    expected = source(latents, timestep, cond).sample
    torch.testing.assert_close(loaded(latents, timestep, cond).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_half_precision_load_equals_diffusers(student, tmp_path):
    """Loaded in bfloat16, norms, time embedder and modulation tables stay float32, as in
    diffusers.
    """
    student.save_pretrained(tmp_path)
    ours, theirs = (
        model.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        for model in (CausalWanTransformer3DModel, WanTransformer3DModel)
    )
    dtypes = [{name: p.dtype for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert dtypes[0] == dtypes[1]
    latents, cond = (x.bfloat16() for x in inputs(3))
    timestep = torch.tensor([700.0])
    expected = theirs(latents, timestep, cond).sample
    torch.testing.assert_close(ours(latents, timestep, cond).sample, expected, atol=0.05, rtol=0.05)
    cache = ours.new_cache(1, HEIGHT, WIDTH)
    ours.commit(latents, 0.0, cond, cache)
    assert ours(latents.float(), 500.0, cond.float(), cache=cache).sample.dtype == torch.bfloat16


def test_casting_a_model_rounds_no_positions(student):
    """``model.to(bfloat16)`` rounds diffusers' rotary tables; ours aren't the model's to cast."""
    student.to(torch.bfloat16)
    assert not list(student.buffers())
    table = rotary_table((0,), (4, 4), 24, torch.device("cpu"))
    assert table.dtype == torch.complex64


@torch.no_grad()
def test_blocks_compile_without_a_graph_break(student):
    """``compile_repeated_blocks`` traces cached and block-causal passes whole, to the same
    numbers.
    """
    latents, cond = inputs(6)
    cache = student.new_cache(1, HEIGHT, WIDTH)
    student.commit(latents[:, :, :3], 0.0, cond, cache)
    calls = (dict(cache=cache.clone()), dict(chunk_frames=3))
    expected = [student(latents, 500.0, cond, **call).sample for call in calls]
    student.compile_repeated_blocks(backend="eager", fullgraph=True)
    for call, sample in zip(calls, expected, strict=True):
        torch.testing.assert_close(
            student(latents, 500.0, cond, **call).sample, sample, atol=1e-6, rtol=0
        )


def test_tuple_output(student):
    """``return_dict=False`` gives ``(sample,)``, with ``return_kv`` also the keys and values."""
    latents, cond = inputs(1)
    assert len(student(latents, 500.0, cond, return_dict=False)) == 1
    sample, kv = student(latents, 500.0, cond, return_kv=True, return_dict=False)
    assert sample.shape == latents.shape
    assert [tuple(x.shape) for x in kv[0]] == [(1, 1, 16, 4, 24)] * 2


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(image_dim=8), "image conditioning"),
        (dict(added_kv_proj_dim=8), "image conditioning"),
        (dict(patch_size=(2, 2, 2)), "joins frames"),
        (dict(qk_norm=None), "qk_norm"),
    ],
)
def test_configurations_that_are_not_supported_are_refused(config, message):
    """A checkpoint of another kind fails where it is opened."""
    with pytest.raises(ValueError, match=message):
        CausalWanTransformer3DModel(**{**GOLDEN_CONFIG, **config})


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(hidden_states=torch.zeros(1, 3, 2, 8, 8)), "expected latents"),
        (dict(hidden_states=torch.zeros(1, 16, 2, 7, 8)), "multiple of the patch"),
        (dict(encoder_hidden_states=torch.zeros(2, 5, 32)), "text embedding"),
        (dict(timestep=torch.zeros(3)), "timesteps"),
        (dict(timestep=torch.zeros(1, 5)), "timesteps"),
        (dict(chunk_frames=3), "does not divide 2"),
        (dict(clean_context=torch.zeros(1, 16, 2, 8, 8)), "needs chunk_frames"),
        (dict(clean_context=torch.zeros(1, 16, 1, 8, 8), chunk_frames=1), "differ in shape"),
        (
            dict(clean_context=torch.zeros(1, 16, 2, 8, 8), chunk_frames=1, return_kv=True),
            "neither cache",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(student, call, message):
    """What a caller can get wrong is said at the border."""
    latents, cond = inputs(2)
    with pytest.raises(ValueError, match=message):
        student(
            **{"hidden_states": latents, "timestep": 500.0, "encoder_hidden_states": cond, **call}
        )
