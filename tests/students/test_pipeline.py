"""StreamVidPipeline: the stream's own clips through diffusers' interface, and folders that open on
either side.
"""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.callbacks import PipelineCallback
from PIL import Image
from safetensors.torch import load_file, save_file

from streamvid.codecs.wan_vae import StreamingAutoencoderKLWan
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.lora import LORA_FILE, LoraConfig, adapt, merged, save_adapter
from streamvid.rollout.sampler import generate
from streamvid.rollout.schedule import StreamConfig
from streamvid.students import pipeline as module
from streamvid.students.clips import export_clip
from streamvid.students.folder import TINY_STUDENT, TINY_TEACHER, load_student, save_student
from streamvid.students.pipeline import StreamVidPipeline

ROOT = Path(__file__).parents[2]
PROMPT = "a small red circle moves up quickly"
SIZE = {"num_frames": 33, "height": 64, "width": 64}
SHORT = {"num_frames": 21, "height": 16, "width": 16}  # two chunks
STREAM = StreamConfig(
    num_steps=2, shift=3.0, window_frames=6, positions="window", max_trained_frames=9
)


def make_transformer():
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 1,
        "attention_head_dim": 12,
        "ffn_dim": 16,
        "num_layers": 1,
        "freq_dim": 8,
    }
    return CausalWanTransformer3DModel(**sizes, text_dim=64)


def open_quietly(folder, **options):
    pipe = StreamVidPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def student():
    return load_student(TINY_STUDENT)


@pytest.fixture(scope="module")
def shipped():
    return open_quietly(TINY_STUDENT)


@pytest.fixture
def folder(tmp_path):
    save_student(tmp_path / "student", make_transformer(), STREAM, TINY_TEACHER, card="# card\n")
    return tmp_path / "student"


@pytest.fixture
def pipe(folder):
    return open_quietly(folder)


def clip(pipe, **changes):
    return pipe(PROMPT, **{**SHORT, "generator": 0, "output_type": "pt", **changes}).frames


# ---- clips ---------------------------------------------------------------------------------------


def test_a_seed_gives_the_clip_of_the_sampler_bit_for_bit(shipped, student):
    """And a generator stands for its seed, also when it is used again."""
    with torch.no_grad():
        expected = generate(
            student.transformer,
            student.codec,
            student.prompts.encode([PROMPT]),
            student.stream,
            seeds=[7],
            **SIZE,
        )
    assert torch.equal(shipped(PROMPT, **SIZE, generator=7, output_type="pt").frames, expected)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        begin = clip(shipped, **{**SIZE, "num_frames": 9}, generator=generator)
        assert torch.equal(begin, expected[:, :9])


def test_an_exported_file_has_the_same_pixels(pipe, folder, tmp_path):
    """``export_clip`` is what tools/sample.py does for a prompt."""
    student = load_student(folder)
    cond = student.prompts.encode([PROMPT])
    out = str(tmp_path / "frames")
    export_clip(
        student.transformer,
        student.codec,
        cond,
        STREAM,
        out,
        seed=3,
        size=(16, 16),
        num_frames=21,
        fps=16,
    )
    images = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "frames").glob("*.png"))]
    made = pipe(PROMPT, **SHORT, generator=3).frames[0]
    assert len(images) == 21 and all(
        np.array_equal(a, np.asarray(b)) for a, b in zip(images, made, strict=True)
    )


def test_a_stream_joined_is_the_clip(pipe):
    chunks = list(pipe.stream(PROMPT, **SHORT, generator=0, output_type="pt"))
    assert [chunk.shape[1] for chunk in chunks] == [9, 12] and torch.equal(
        torch.cat(chunks, dim=1), clip(pipe)
    )
    endless = pipe.stream(PROMPT, height=16, width=16, generator=0, output_type="pt")
    assert [next(endless).shape[1] for _ in range(4)] == [9, 12, 12, 12]


def test_a_pipeline_from_a_pipe_makes_its_clips_with_its_parts(pipe):
    """Also in bfloat16, which diffusers' own would silently widen in both, and with the schedule,
    which it would lose.
    """
    for dtype in (torch.float32, torch.bfloat16):
        expected = clip(pipe.to(dtype))
        second = StreamVidPipeline.from_pipe(pipe)
        assert torch.equal(clip(second), expected) and second.transformer is pipe.transformer
        assert second.transformer.dtype is dtype and (second.stream_config, second.card) == (
            STREAM,
            pipe.card,
        )
    other = StreamVidPipeline.from_pipe(
        pipe, stream_config=StreamConfig(num_steps=1), torch_dtype=torch.float32
    )
    assert other.stream_config.num_steps == 1 and other.transformer.dtype is torch.float32
    with pytest.raises(ValueError, match="no option scheduler; it takes dtype, "):
        StreamVidPipeline.from_pipe(pipe, scheduler=None)
    with pytest.raises(ValueError, match="takes a StreamVidPipeline, got str"):
        StreamVidPipeline.from_pipe("folder")


def test_output_types_show_the_same_clip(pipe):
    frames, array = clip(pipe), clip(pipe, output_type="np")
    assert array.shape == (1, 21, 16, 16, 3) and np.array_equal(
        array, frames.permute(0, 1, 3, 4, 2).numpy()
    )
    images = clip(pipe, output_type="pil")
    assert len(images) == 1 and len(images[0]) == 21 and images[0][0].size == (16, 16)
    assert np.array_equal(np.asarray(images[0][5]), (array[0, 5] * 255).round().astype("uint8"))
    latents = clip(pipe, output_type="latent")
    assert latents.shape == (1, 16, 6, 2, 2) and torch.equal(
        pipe.vae.decode_latents(latents), frames
    )
    assert torch.equal(
        pipe(PROMPT, **SHORT, generator=0, output_type="pt", return_dict=False)[0], frames
    )


def test_a_video_depends_on_its_prompt_and_seed_alone(pipe):
    """Prompts come one after the other, each with its videos; a single seed counts on over all of
    them.
    """
    both = pipe(
        [PROMPT, "a blue square"], **SHORT, num_videos_per_prompt=2, generator=5, output_type="pt"
    ).frames
    alone = [
        pipe(text, **SHORT, generator=seed, output_type="pt").frames[0]
        for text, seed in [(PROMPT, 5), (PROMPT, 6), ("a blue square", 7), ("a blue square", 8)]
    ]
    torch.testing.assert_close(both, torch.stack(alone), atol=1e-5, rtol=0)
    assert not torch.equal(alone[0], alone[1])
    named = pipe([PROMPT, "a blue square"], **SHORT, generator=[6, 7], output_type="pt").frames
    torch.testing.assert_close(named, torch.stack(alone[1:3]), atol=1e-5, rtol=0)


def test_without_a_generator_torch_seeds_the_clip(pipe):
    clips = [torch.manual_seed(seed) and clip(pipe, generator=None) for seed in (0, 0, 1)]
    assert torch.equal(clips[0], clips[1]) and not torch.equal(clips[0], clips[2])


def test_embeddings_stand_in_for_prompts(pipe, folder):
    cond = load_student(folder).prompts.encode([PROMPT])
    bare = open_quietly(folder, text_encoder=None, tokenizer=None)
    made = bare(prompt_embeds=cond, **SHORT, generator=0, output_type="pt").frames
    assert torch.equal(made, clip(pipe))
    with pytest.raises(ValueError, match="no text encoder; pass prompt_embeds"):
        clip(bare)


def test_steps_are_the_student_s_own_or_those_asked_for(pipe):
    counted = []
    for steps in (None, 1, 3):
        calls = []
        clip(pipe, num_inference_steps=steps, callback_on_step_end=lambda *args: calls.append(args))
        counted.append(len(calls))
    assert counted == [4, 2, 6]  # in two chunks


# ---- callbacks -----------------------------------------------------------------------------------


def test_the_callback_sees_each_step_of_each_chunk(pipe):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, timestep, kwargs["latents"]))
        return kwargs

    latents = clip(pipe, callback_on_step_end=callback, output_type="latent")
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] and [t for _, t, _ in seen] == [
        1000,
        750,
        1000,
        750,
    ]
    # last steps are what is decoded
    assert torch.equal(torch.cat([seen[1][2], seen[3][2]], dim=2), latents)


def test_the_callback_changes_what_the_stream_goes_on_with(pipe):
    blank = {"latents": torch.zeros(1, 16, 3, 2, 2)}
    latents = clip(
        pipe,
        callback_on_step_end=lambda pipe, step, t, kwargs: blank if step == 1 else {},
        output_type="latent",
    )
    untouched = clip(pipe, output_type="latent")
    assert not latents[:, :, :3].any()
    # the next chunk saw it as context
    assert not torch.equal(latents[:, :, 3:], untouched[:, :, 3:])


def test_an_interrupted_clip_ends_with_its_chunk_and_the_next_one_is_whole(pipe):
    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = True
        return kwargs

    assert torch.equal(clip(pipe, callback_on_step_end=stop), clip(pipe)[:, :9])
    assert clip(pipe).shape[1] == 21


def test_an_interrupt_ends_the_call_of_its_callback_only(pipe):
    """It was the pipeline's, and ended every clip under way, in other threads too."""

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = True
        assert pipe.interrupt
        return kwargs

    options = {**SHORT, "output_type": "pt"}
    streams = [
        pipe.stream(
            PROMPT, **options, generator=seed, callback_on_step_end=stop if seed == 1 else None
        )
        for seed in range(3)
    ]
    taken = [[next(stream).shape[1]] for stream in streams]  # all are under way, in turns
    for stream, frames in zip(streams, taken):
        frames += [chunk.shape[1] for chunk in stream]
    assert taken == [[9, 12], [9], [9, 12]] and not pipe.interrupt


def test_calls_in_threads_are_interrupted_apart(pipe):
    barrier = threading.Barrier(3)

    def make(seed):
        def callback(pipe, step, timestep, kwargs):
            if step == 0:
                barrier.wait(60)
                pipe._interrupt = seed == 1
                barrier.wait(60)
            return kwargs

        return clip(pipe, generator=seed, callback_on_step_end=callback).shape[1]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(make, range(3))) == [21, 9, 21]


def test_an_interrupt_from_elsewhere_ends_all_that_are_under_way(pipe):
    streams = [pipe.stream(PROMPT, **SHORT, generator=0, output_type="pt") for _ in range(2)]
    for stream in streams:
        next(stream)
    pipe._interrupt = True
    assert [list(stream) for stream in streams] == [[], []] and clip(pipe).shape[1] == 21


def test_a_callback_that_changes_the_shape_is_refused(pipe):
    """It gave a clip of 25 frames for 81."""
    for cut in (lambda x: x[:, :, :1], lambda x: x.cpu().numpy()):
        with pytest.raises(
            ValueError, match=r"after_x0 gave .* for chunk 0, expected a tensor \[1, 16, 3, 2, 2\]"
        ):
            clip(
                pipe,
                callback_on_step_end=lambda pipe, step, t, kwargs: {
                    "latents": cut(kwargs["latents"])
                },
            )


def test_a_callback_of_diffusers_brings_its_own_inputs(pipe):
    class Count(PipelineCallback):
        tensor_inputs = ["latents"]
        steps = 0

        def callback_fn(self, pipe, step, timestep, kwargs):
            self.steps += 1
            return kwargs

    count = Count()
    clip(pipe, callback_on_step_end=count)
    assert count.steps == 4


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_frames": 20}, "num_frames=20 is not 1 \\+ 4 k; use 17 or 21"),
        (
            {"num_frames": 17},
            "does not divide 5 latent frames; use 3 or 6, i.e. num_frames=9 or 21",
        ),
        ({"num_frames": 0}, "num_frames=0"),
        ({"num_frames": None}, "endless clip; use stream"),
        ({"num_frames": 21.0}, "num_frames=21.0, expected a whole number"),
        ({"height": 20}, "multiples of 16; use 16 x 16"),
        ({"width": 24}, "multiples of 16; use 16 x 32"),
        ({"num_inference_steps": 0}, "num_steps=0"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
        ({"generator": [1, 2]}, "2 generators for 1 videos"),
        ({"generator": "7"}, "generator='7', expected a torch.Generator or a seed"),
        ({"output_type": "tensor"}, "output_type='tensor', expected one of pil, np, pt, latent"),
        ({"prompt_embeds": torch.zeros(1, 3, 64)}, "either prompt or prompt_embeds"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "expected a text or a list"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 32)},
            r"\[B, L, 64\], got \[1, 3, 32\]",
        ),
        (
            {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise"]},
            "has noise; there is only latents",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(pipe, changes, message):
    arguments = {"prompt": PROMPT, **SHORT, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**arguments)
    assert "\n" not in str(caught.value)
    if arguments["num_frames"] is not None:
        with pytest.raises(ValueError, match=message):
            pipe.stream(**arguments)  # at once, not with the first chunk


# ---- folders -------------------------------------------------------------------------------------


def test_a_student_folder_opens_as_a_pipeline_and_its_transformer_in_diffusers(
    folder, pipe, tmp_path
):
    made = make_transformer()
    assert all(
        torch.equal(p, q)
        for p, q in zip(pipe.transformer.parameters(), made.parameters(), strict=True)
    )
    assert pipe.stream_config == STREAM
    opened = WanTransformer3DModel.from_pretrained(folder / "transformer")
    assert opened.state_dict().keys() == made.state_dict().keys()
    save_student(tmp_path / "borrowing", made, STREAM)
    assert torch.equal(clip(open_quietly(tmp_path / "borrowing")), clip(pipe))


def test_what_a_pipeline_saves_is_a_student_folder(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    back = open_quietly(tmp_path / "saved", components=tmp_path / "nowhere")  # complete in itself
    assert torch.equal(clip(back), clip(pipe))
    student = load_student(tmp_path / "saved", components=tmp_path / "nowhere")
    with torch.no_grad():
        cond = student.prompts.encode([PROMPT])
        same = generate(
            student.transformer, student.codec, cond, student.stream, seeds=[0], **SHORT
        )
    assert torch.equal(same, clip(pipe))
    assert (tmp_path / "saved/README.md").read_text() == "# card\n"
    WanTransformer3DModel.from_pretrained(tmp_path / "saved/transformer")
    indices = [
        json.loads((path / "model_index.json").read_text()) for path in (folder, tmp_path / "saved")
    ]
    assert indices[0] == indices[1] and indices[0]["vae"] == [
        "streamvid.codecs.tiny_vae",
        "AutoencoderTinyVideo",
    ]


def test_a_student_over_wan_s_own_codec(pipe, tmp_path):
    """Saved, the codec is diffusers' class again; the folder opens with the streaming one."""
    torch.manual_seed(0)
    pipe.vae = (
        StreamingAutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        .requires_grad_(False)
        .eval()
    )
    pipe.save_pretrained(tmp_path / "wan")
    assert (
        json.loads((tmp_path / "wan/vae/config.json").read_text())["_class_name"]
        == "AutoencoderKLWan"
    )
    save_student(tmp_path / "copy", pipe.transformer, STREAM, tmp_path / "wan")
    indices = [
        json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("wan", "copy")
    ]
    assert indices[0] == indices[1] and indices[0]["vae"][1] == "StreamingAutoencoderKLWan"
    assert torch.equal(clip(open_quietly(tmp_path / "wan")), clip(pipe))


def test_saving_replaces_a_student_and_nothing_else(pipe, folder, tmp_path):
    pipe.stream_config = StreamConfig(num_steps=1)
    pipe.save_pretrained(folder)
    assert load_student(folder).stream.num_steps == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="is no student folder"):
        pipe.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"


def test_a_pipeline_without_text_encoder_saves_a_folder_that_borrows(folder, pipe, tmp_path):
    open_quietly(folder, text_encoder=None, tokenizer=None).save_pretrained(tmp_path / "bare")
    assert (
        not (tmp_path / "bare/text_encoder").exists() and not (tmp_path / "bare/tokenizer").exists()
    )
    assert torch.equal(clip(open_quietly(tmp_path / "bare")), clip(pipe))


def test_damage_and_unknown_options_are_one_line(folder):
    with pytest.raises(ValueError, match="no option varient"):
        StreamVidPipeline.from_pretrained(folder, varient="fp16")
    with pytest.raises(ValueError, match="a tokenizer without a text_encoder"):
        StreamVidPipeline.from_pretrained(folder, text_encoder=None)
    shutil.rmtree(folder / "vae")
    (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="truncated or damaged"):
        StreamVidPipeline.from_pretrained(folder)


def test_a_precision_is_that_of_the_transformer_however_it_is_asked_for(folder, pipe):
    """Cast or loaded, the same parameters stay in float32; codec and text encoder do."""
    assert pipe.to("cpu", torch.bfloat16) is pipe
    for other in (
        open_quietly(folder, dtype=torch.bfloat16),
        open_quietly(folder, torch_dtype=torch.bfloat16),
    ):
        pairs = list(
            zip(pipe.transformer.parameters(), other.transformer.parameters(), strict=True)
        )
        assert all(p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32, torch.bfloat16}
    assert {p.dtype for part in (pipe.vae, pipe.text_encoder) for p in part.parameters()} == {
        torch.float32
    }
    assert clip(pipe).isfinite().all()


# ---- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter that changes something, and the student with it merged in."""
    pytest.importorskip("peft")
    network = adapt(make_transformer(), LoraConfig(rank=2, alpha=4.0), 0)
    for index, parameter in enumerate(network.parameters()):
        parameter.data = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(index)
        )
    save_adapter(network, tmp_path / "lora")
    return tmp_path / "lora", merged(network)


def test_an_adapter_makes_the_student_that_it_was_trained_as(pipe, adapter, tmp_path):
    """Its alpha counts; merged and saved, it is part of the student; unloaded, it is gone."""
    path, trained = adapter
    save_student(tmp_path / "trained", trained, STREAM, TINY_TEACHER)
    plain, expected = (
        clip(pipe, output_type="latent"),
        clip(open_quietly(tmp_path / "trained"), output_type="latent"),
    )
    assert not torch.allclose(plain, expected, atol=1e-3)

    pipe.load_lora_weights(path, adapter_name="own")
    torch.testing.assert_close(clip(pipe, output_type="latent"), expected, atol=1e-4, rtol=1e-3)
    pipe.set_adapters(["own"], [0.0])
    torch.testing.assert_close(clip(pipe, output_type="latent"), plain)
    pipe.set_adapters(["own"], [1.0])
    with pytest.raises(ValueError, match="merge them by fuse_lora"):
        pipe.save_pretrained(tmp_path / "half")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    torch.testing.assert_close(
        clip(open_quietly(tmp_path / "fused"), output_type="latent"), expected, atol=1e-4, rtol=1e-3
    )


def edited(path, change):
    tensors = load_file(path / LORA_FILE)
    return {name: tensor for old, value in tensors.items() for name, tensor in change(old, value)}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda name, tensor: [(name.replace("blocks.0", "blocks.7"), tensor)],
            r"LoRA of another model: blocks.7.\S+ is not there",
        ),
        (
            lambda name, tensor: [(name, tensor.repeat(1, 2) if "lora_A" in name else tensor)],
            r"LoRA of another model: blocks.0.\S+ \(12, 24\) instead of \(12, 12\)",
        ),
        (
            lambda name, tensor: [(name.replace("transformer.", "unet."), tensor)],
            "LoRA of another model: unet.blocks.0",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(pipe, adapter, tmp_path, change, message):
    """diffusers would warn and go on with what fits."""
    before = clip(pipe)
    tensors = edited(adapter[0], change)
    save_file(tensors, tmp_path / "other.safetensors")
    for source in (tmp_path / "other.safetensors", tensors):
        with pytest.raises(ValueError, match=message) as caught:
            pipe.load_lora_weights(source)
        assert "\n" not in str(caught.value)
    assert torch.equal(clip(pipe), before)


def test_an_adapter_that_cannot_be_read_and_a_missing_peft_are_one_line(
    pipe, tmp_path, monkeypatch
):
    (tmp_path / "bad.safetensors").write_bytes(b"\x08")
    with pytest.raises(
        ValueError, match="cannot read LoRA weights from .*bad.safetensors"
    ) as caught:
        pipe.load_lora_weights(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(module, "is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"need peft, .* `pip install 'streamvid\[lora\]'`"):
        pipe.load_lora_weights(tmp_path)


def test_nothing_else_imports_the_pipeline():
    """It loads diffusers' pipelines, which training and streaming do without."""
    sources = [file for top in ("streamvid", "tools") for file in (ROOT / top).rglob("*.py")]
    users = {file.name for file in sources if "import StreamVidPipeline" in file.read_text()}
    assert users == {"pipeline.py"}  # its own docstring
