"""A diffusers pipeline as a black box gives what the pipeline gives, and teaches through a latent
set.
"""

import builtins
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from streamvid.codecs.load import open_codec
from streamvid.data.latents import LatentClips
from streamvid.seeding import key_to_seed
from streamvid.teachers.clip_folder import ClipRenderer, encode_clips
from streamvid.teachers.load import open_teacher
from streamvid.teachers.pipeline import PipelineTeacher

SIZE = dict(num_frames=5, height=32, width=48, num_inference_steps=2, max_sequence_length=6)
PROMPTS = ["a red ball", "a cat", "a cat"]


@pytest.fixture
def teacher(wan):
    return PipelineTeacher.from_pretrained(wan("2.1"), SIZE)


@pytest.mark.parametrize(
    "family, kind, frames", [("wan", "2.1", 5), ("wan", "a14b", 5), ("cogvideox", "2b", 9)]
)
def test_clips_are_the_pipelines_own(request, family, kind, frames):
    folder, size = request.getfixturevalue(family)(kind), {**SIZE, "num_frames": frames}
    clips = PipelineTeacher.from_pretrained(folder, size).generate(PROMPTS, seed=7)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert clips.shape == (3, frames, 3, 32, 48) and clips.min() >= 0 and clips.max() <= 1
    for index, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(key_to_seed("clip", 7, index))
        # [T, 3, H, W]
        expected = pipeline(prompt, generator=generator, output_type="pt", **size).frames[0]
        torch.testing.assert_close(clips[index], expected, rtol=0, atol=1e-6)
    assert not torch.equal(clips[1], clips[2])  # the same prompt, another seed


def test_a_clip_does_not_depend_on_the_others(teacher):
    assert torch.equal(teacher.generate(PROMPTS)[:1], teacher.generate(PROMPTS[:1]))


def test_its_clips_become_a_latent_set(teacher, wan, tmp_path):
    codec, embed = open_codec(wan("2.1")), open_teacher(wan("2.1")).encode_prompt
    encode_clips(tmp_path / "set.safetensors", ClipRenderer(teacher.render, PROMPTS), codec, embed)
    data = LatentClips(tmp_path / "set.safetensors", 0, None, None, 0.5)
    assert len(data) == 3
    latents = codec.encode_frames(teacher.generate(PROMPTS[:1]))
    batch = data.batch(0, "student", 0, range(20))
    nearest = (batch["latents"].float() - latents).flatten(1).abs().amax(1).min()
    assert nearest < 1e-2 and batch["cond"].shape == (20, 6, 8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_frame": 5}, "WanPipeline has no setting num_frame; did you mean num_frames?"),
        ({"prompt": "a cat"}, "prompt is not to be set"),
        ({"output_type": "pil"}, "output_type is not to be set"),
    ],
)
def test_settings_are_checked_before_hours_of_sampling(wan, settings, message):
    with pytest.raises(ValueError, match=message):
        PipelineTeacher.from_pretrained(wan("2.1"), settings)


def test_a_pipeline_that_rounds_what_was_asked_says_so(wan):
    """Wan makes 5 frames of 7, with a warning only."""
    with pytest.raises(ValueError, match="made num_frames=5 of num_frames=7"):
        PipelineTeacher.from_pretrained(wan("2.1"), {**SIZE, "num_frames": 7}).generate(PROMPTS[:1])


def test_an_image_pipeline_needs_its_image(wan):
    with pytest.raises(ValueError, match="WanImageToVideoPipeline needs image"):
        PipelineTeacher.from_pretrained(wan("2.1_image"), SIZE)


def test_what_makes_no_clips_is_refused():
    class Silent:
        def __call__(self, text):
            """No prompt."""

    class Stills:
        def __call__(self, prompt, generator, output_type):
            return SimpleNamespace(frames=[np.zeros((8, 8, 3))])

    with pytest.raises(ValueError, match="prompt is unknown to the call of Silent"):
        PipelineTeacher(Silent())
    with pytest.raises(ValueError, match=r"Stills gave \(8, 8, 3\), expected frames"):
        PipelineTeacher(Stills()).render("a cat", 0)


DAMAGE = {
    "no model_index.json": lambda f: (f / "model_index.json").unlink(),
    "vae/.*is truncated": (
        lambda f: next((f / "vae").glob("*.safetensors")).write_bytes(b"1234567890")
    ),
    "cannot open the pipeline": lambda f: shutil.rmtree(f / "vae"),
    "cannot open the pipeline.*": (
        lambda f: (f / "model_index.json").write_text(json.dumps({"_class_name": "Nothing"}))
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(wan, tmp_path, message):
    folder = shutil.copytree(wan("2.1"), tmp_path / "teacher")
    DAMAGE[message](folder)
    with pytest.raises(ValueError, match=message) as caught:
        PipelineTeacher.from_pretrained(folder, SIZE)
    assert "\n" not in str(caught.value)


# ---- Code in a folder ----------------------------------------------------------------------------


def write_code(folder, name):
    """A file that leaves a mark if it runs, and then has any class that is asked for."""
    code = (
        "from diffusers import WanPipeline\nfrom transformers import"
        f" UMT5EncoderModel\nopen({str(folder / 'ran')!r}, 'w')\n"
    )
    (folder / name).write_text(
        code
        + "class Evil(WanPipeline):\n    pass\nclass EvilEncoder(UMT5EncoderModel):\n    pass\n"
    )


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def bring_pipeline(folder, name="pipeline"):
    write_code(folder, f"{name}.py")
    edit(folder / "model_index.json", _class_name=[name, "Evil"])


def bring_unnamed_pipeline(folder):
    write_code(folder, "None.py")


def bring_part(folder):
    write_code(folder, "text_encoder/evil.py")
    edit(folder / "model_index.json", text_encoder=["evil", "EvilEncoder"])


def bring_part_under_a_known_name(folder):
    write_code(folder, "text_encoder/transformers.py")


def bring_module_from_elsewhere(folder):
    edit(folder / "model_index.json", text_encoder=["antigravity", "EvilEncoder"])


def bring_automatic_tokenizer(folder):
    edit(folder / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    names = {"AutoTokenizer": ["elsewhere/evil--evil.Evil", None]}
    edit(folder / "tokenizer/tokenizer_config.json", tokenizer_class="Evil", auto_map=names)


CODE = {
    "_class_name": bring_pipeline,
    "_class_name of diffusers": lambda folder: bring_pipeline(folder, "wan"),
    "None.py is code": bring_unnamed_pipeline,
    "names evil for text_encoder, expected diffusers": bring_part,
    "text_encoder/transformers.py is code": bring_part_under_a_known_name,
    "names antigravity for text_encoder": bring_module_from_elsewhere,
    "names AutoTokenizer for tokenizer, expected the class itself": bring_automatic_tokenizer,
}


@pytest.mark.parametrize("message", CODE)
def test_code_in_a_folder_is_neither_run_nor_asked_about(wan, tmp_path, monkeypatch, message):
    """diffusers before 0.38 ran it unasked."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda question="": questions.append(question) or "y")
    folder = shutil.copytree(wan("2.1"), tmp_path / "teacher")
    CODE[message](folder)
    with pytest.raises(ValueError, match=message) as caught:
        PipelineTeacher.from_pretrained(folder, SIZE)
    assert "never run" in str(caught.value) and "\n" not in str(caught.value)
    assert questions == [] and not (folder / "ran").exists()


def test_a_name_in_auto_map_that_nothing_asks_for_is_no_code(wan, tmp_path):
    folder = shutil.copytree(wan("2.1"), tmp_path / "teacher")
    edit(folder / "text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"})
    opened, plain = (PipelineTeacher.from_pretrained(path, SIZE) for path in (folder, wan("2.1")))
    assert torch.equal(opened.generate(PROMPTS[:1]), plain.generate(PROMPTS[:1]))
