"""`streamvid convert` as a user calls it: a student folder of a published file, and one line for
each mistake.
"""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel

from streamvid.cli import convert
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.convert import original_state_dict
from streamvid.rollout.sampler import stream_latents
from streamvid.rollout.schedule import StreamConfig, build_schedule, cost_of
from streamvid.students.folder import (
    TINY_TEACHER,
    load_stream_config,
    load_student,
    load_transformer,
)

LISTS = {4: (1.0, 0.9375, 0.83333, 0.625), 2: (1.0, 0.83333), 1: (1.0,)}
"""What Self-Forcing's nominal 1000, 750, 500, 250 and 1000, 500 and 1000 are at shift 5."""


def run(capsys, *argv) -> tuple[int, str, str]:
    """The exit code, what went to stdout and what to stderr."""
    try:
        code = convert.main([str(part) for part in argv])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        ffn_dim=64,
        num_layers=2,
        text_dim=64,
        freq_dim=32,
    ).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    """As Self-Forcing's file is: two sets of weights, the smoothed one with FSDP in its names."""
    original = original_state_dict(model.state_dict())
    live = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in original.items()}
    smoothed = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in original.items()}
    torch.save({"generator": live, "generator_ema": smoothed}, tmp_path / "published.pt")
    return tmp_path / "published.pt"


def test_a_published_file_becomes_a_student_that_diffusers_opens(
    model, checkpoint, tmp_path, capsys
):
    code, out, _ = run(capsys, "--from", "self-forcing", checkpoint, "--to", tmp_path / "student")
    assert (
        code == 0 and f"{sum(p.numel() for p in model.parameters()):,} parameters in float32" in out
    )
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "student" / "transformer")
    for opened in (load_transformer(tmp_path / "student"), theirs):
        weights = opened.state_dict()
        assert all(
            torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items()
        )
    assert "published.pt (self-forcing)" in (tmp_path / "student" / "README.md").read_text()


def test_a_student_in_diffusers_layout_gets_the_schedule_of_its_kind(model, tmp_path, capsys):
    """As FastVideo publishes them, without a stream_config.json."""
    model.save_pretrained(tmp_path / "published" / "transformer")
    code, *_ = run(
        capsys, "--from", "self-forcing", tmp_path / "published", "--to", tmp_path / "student"
    )
    assert code == 0 and load_stream_config(tmp_path / "student") == stream_of("self-forcing")
    weights = load_transformer(tmp_path / "student").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_with_components_it_is_complete(checkpoint, tmp_path, capsys):
    code, *_ = run(
        capsys,
        "--from",
        "krea",
        checkpoint,
        "--components",
        TINY_TEACHER,
        "--to",
        tmp_path / "student",
    )
    assert code == 0 and {"vae", "text_encoder", "tokenizer"} <= {
        part.name for part in (tmp_path / "student").iterdir()
    }
    assert load_student(tmp_path / "student").stream.window_frames == 6


def test_which_and_lora_are_used(model, checkpoint, tmp_path, capsys):
    down, up = torch.ones(1, 128), torch.ones(128, 1)
    names = [f"base_model.model.blocks.0.self_attn.q.lora_{side}.weight" for side in "AB"]
    torch.save({"generator_lora": dict(zip(names, (down, up)))}, tmp_path / "lora.pt")
    code, *_ = run(
        capsys,
        "--from",
        "longlive",
        checkpoint,
        "--which",
        "generator",
        "--lora",
        tmp_path / "lora.pt",
        "--to",
        tmp_path / "student",
    )
    weights = load_transformer(tmp_path / "student").state_dict()
    assert code == 0 and torch.equal(
        weights.pop("blocks.0.attn1.to_q.weight"), torch.ones(128, 128)
    )
    assert not any(tensor.any() for tensor in weights.values())
    assert "merged: lora.pt (1 updates)" in (tmp_path / "student" / "README.md").read_text()


# ---- how each is streamed ------------------------------------------------------------------------


def stream_of(family) -> StreamConfig:
    return StreamConfig(**convert.STREAMS[family])


@pytest.mark.parametrize(
    "family, chunk, window, sink, first, later",
    [
        ("self-forcing", 3, 21, 0, LISTS[4], LISTS[4]),
        ("causal-forcing", 3, 21, 0, LISTS[4], LISTS[4]),
        ("causal-forcing-framewise", 1, 21, 0, LISTS[4], LISTS[4]),
        ("causal-forcing-2step", 1, 21, 0, LISTS[4], LISTS[2]),
        ("causal-forcing-1step", 1, 21, 0, LISTS[4], LISTS[1]),
        ("causvid", 3, 21, 0, (1.0, 0.757, 0.522), (1.0, 0.757, 0.522)),
        ("longlive", 3, 12, 3, LISTS[4], LISTS[4]),
        ("diagdistill", 3, 12, 3, (1.0, 0.933, 0.733, 0.35714), (1.0, 0.35714)),
        ("krea", 3, 6, 1, LISTS[4], LISTS[4]),
    ],
)
def test_each_is_streamed_as_published(family, chunk, window, sink, first, later):
    stream = stream_of(family)
    assert (stream.chunk_frames, stream.window_frames, stream.sink_frames) == (chunk, window, sink)
    events = list(build_schedule(stream, num_chunks=4))
    times = [tuple(event.t[0] for event in events if event.chunks == (k,)) for k in range(4)]
    assert times[0] == pytest.approx(first, abs=1e-5) and times[3] == pytest.approx(later, abs=1e-5)


@pytest.mark.parametrize(
    "family, nfe, commits", [("self-forcing", 28, 6), ("diagdistill", 17, 0), ("causvid", 21, 6)]
)
def test_the_cost_of_a_clip_of_81_frames_is_the_published_one(family, nfe, commits):
    stream = stream_of(family)
    cost = cost_of(build_schedule(stream, num_chunks=7), stream.chunk_frames, stream.commit)
    assert (cost.nfe, cost.commits) == (nfe, commits)


def test_kreas_frames_are_numbered_as_in_its_server(model):
    """The stream's first frame, the last two and the chunk, numbered 0 to 5, however long the
    stream is.
    """
    stream = stream_of("krea")
    cache = model.new_cache(
        1,
        4,
        4,
        stream.window_frames,
        stream.sink_frames,
        stream.positions,
        stream.max_trained_frames,
    )
    for _ in range(10):
        model.commit(torch.zeros(1, 16, 3, 4, 4), torch.zeros(1), torch.zeros(1, 2, 64), cache)
    assert cache.visible_frames(3) == (0, 28, 29)
    assert cache.frame_positions(3) == ((0, 1, 2), (3, 4, 5))


@pytest.mark.parametrize("family", convert.STREAMS)
def test_every_family_streams(family, model, checkpoint, tmp_path, capsys):
    """From the written folder, past its window."""
    code, *_ = run(capsys, "--from", family, checkpoint, "--to", tmp_path / "student")
    stream = load_stream_config(tmp_path / "student")
    assert code == 0 and stream == stream_of(family)
    with torch.no_grad():
        chunks = list(
            stream_latents(
                load_transformer(tmp_path / "student"),
                torch.zeros(1, 2, 64),
                stream,
                seeds=[0],
                latent_shape=(16, 2, 2),
                num_chunks=27 // stream.chunk_frames,
            )
        )
    assert sum(chunk.latents.shape[2] for chunk in chunks) == 27 and all(
        chunk.latents.isfinite().all() for chunk in chunks
    )


# ---- mistakes ------------------------------------------------------------------------------------


def refused(capsys, tmp_path, match, *argv):
    target = tmp_path / "student"
    code, out, err = run(capsys, *argv, "--to", target)
    assert (
        code == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and match in err
        and not out
    )
    assert not target.exists() and not list(tmp_path.glob(".*"))


class Code:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_mistakes_are_one_line_and_nothing_is_written(checkpoint, tmp_path, capsys):
    torch.save({"generator": Code()}, tmp_path / "code.pt")
    torch.save(
        {"generator": {"model.patch_embedding.weight": torch.zeros(8, 4, 1, 2, 2)}},
        tmp_path / "part.pt",
    )
    torch.save(
        {"a.lora_A.weight": torch.zeros(1, 2), "a.lora_B.weight": torch.zeros(2, 1)},
        tmp_path / "lora.pt",
    )
    seeing = {
        **torch.load(checkpoint)["generator"],
        "model.patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2),
    }
    torch.save(seeing, tmp_path / "i2v.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    refused(
        capsys,
        tmp_path,
        "takes 36 channels and makes 16: it holds image-to-video weights",
        "--from",
        "self-forcing",
        tmp_path / "i2v.pt",
    )
    refused(capsys, tmp_path, "is no checkpoint, is damaged", "--from", "wan", tmp_path / "text.pt")
    refused(capsys, tmp_path, "holds code", "--from", "wan", tmp_path / "code.pt")
    refused(capsys, tmp_path, "no file", "--from", "wan", tmp_path / "absent.pt")
    refused(
        capsys, tmp_path, "has no text_embedding.0.weight", "--from", "wan", tmp_path / "part.pt"
    )
    refused(
        capsys,
        tmp_path,
        "it has generator, generator_ema",
        "--from",
        "wan",
        checkpoint,
        "--which",
        "ema",
    )
    refused(
        capsys,
        tmp_path,
        "LoRA of another model",
        "--from",
        "wan",
        checkpoint,
        "--lora",
        tmp_path / "lora.pt",
    )
    refused(
        capsys,
        tmp_path,
        "has no folder vae/",
        "--from",
        "wan",
        checkpoint,
        "--components",
        tmp_path,
    )
    refused(
        capsys, tmp_path, "invalid choice: 'self_forcing'", "--from", "self_forcing", checkpoint
    )


def test_only_a_student_is_replaced(checkpoint, tmp_path, capsys):
    """A home folder named by mistake would be gone otherwise."""
    target = tmp_path / "target"
    target.mkdir()
    assert run(capsys, "--from", "krea", checkpoint, "--to", target)[0] == 0
    assert run(capsys, "--from", "longlive", checkpoint, "--to", target)[0] == 0
    assert json.loads((target / "stream_config.json").read_text())["window_frames"] == 12
    (target / "stream_config.json").unlink()
    before = sorted(target.rglob("*"))
    for taken in (target, checkpoint):
        code, _, err = run(capsys, "--from", "krea", checkpoint, "--to", taken)
        assert code == 2 and "is there and is no student" in err and err.count("\n") == 1
    assert sorted(target.rglob("*")) == before and checkpoint.is_file()
