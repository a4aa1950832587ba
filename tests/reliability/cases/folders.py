"""Student and teacher folders that hold code, nonsense, or numbers that are none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.reliability.cases.damage import changed_json, edited_json, emptied, retensored, truncated
from tests.reliability.cases.weights import sample
from tests.reliability.runner import (
    Case,
    NotHeld,
    Place,
    decent,
    refused,
    worked,
    worked_or_refused,
)

AREA = "folders"
EVIL = (
    "import pathlib\npathlib.Path({marker!r}).write_text('')\nclass Evil:\n    def __init__(self,"
    " *a, **k): pass\n"
)
Damage = Callable[[Path, Place], Any]

WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def code(home: Path, place: Place, *files: str) -> None:
    for file in files:
        (home / file).write_text(EVIL.format(marker=str(place.marker)))


def set_json(file: str, **values: Any) -> Damage:
    """With other values of these keys; ``...`` drops one."""

    def damage(home: Path, place: Place) -> None:
        for key, value in values.items():
            changed_json(home / file, key, value)

    return damage


def with_code(file: str, files: tuple[str, ...], **values: Any) -> Damage:
    def damage(home: Path, place: Place) -> None:
        set_json(file, **values)(home, place)
        code(home, place, *files)

    return damage


TOKENIZER = "tokenizer/tokenizer_config.json"
AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
CODE: dict[str, Damage] = {
    "tokenizer auto_map": with_code(
        TOKENIZER, ("tokenizer/evil.py",), auto_map=AUTO_MAP, tokenizer_class="Evil"
    ),
    "tokenizer auto_map of a known class": with_code(
        TOKENIZER, ("tokenizer/evil.py",), auto_map=AUTO_MAP
    ),
    "tokenizer auto_map of another repository": with_code(
        TOKENIZER, (), auto_map={"AutoTokenizer": ["x/y--evil.Evil", None]}, tokenizer_class="Evil"
    ),
    "text encoder auto_map": with_code(
        "text_encoder/config.json",
        ("text_encoder/evil.py",),
        auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
        model_type="evil",
    ),
    "transformer auto_map": with_code(
        "transformer/config.json",
        ("transformer/evil.py",),
        auto_map={"AutoModel": "evil.Evil"},
        _class_name="Evil",
    ),
    "vae of a module": with_code("vae/config.json", ("vae/evil.py",), _class_name="evil.Evil"),
    "sitecustomize.py": lambda home, place: code(
        home, place, "sitecustomize.py", "torch.py", "json.py"
    ),
}
"""Of a student; code is not run, whether the folder is opened or refused."""

INDEXES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a pipeline of its own": ({"_class_name": ["pipeline", "Evil"]}, ("pipeline.py",)),
    "a named pipeline file": ({"_class_name": ["evil", "Evil"]}, ("evil.py",)),
    "a component's module": ({"transformer": ["evil", "Evil"]}, ("transformer/evil.py",)),
    "a component's own file": ({"vae": ["vae", "Evil"]}, ("vae/vae.py", "vae.py")),
    "os as a module": ({"transformer": ["os", "system"]}, ()),
    "builtins as a module": ({"scheduler": ["builtins", "exec"]}, ()),
}


def code_is_not_run(place: Place, damage: Damage) -> None:
    """The runner looks for the marker after every case."""
    home = place.part("student")
    damage(home, place)
    worked_or_refused(sample(place, home))


def index_runs_no_code(
    place: Place, values: dict[str, Any], files: tuple[str, ...], use: str
) -> None:
    home = place.part("teacher")
    edited_json(home / "model_index.json", lambda index: index.update(values))
    code(home, place, *files)
    if use == "teacher":
        outcome = place.run(
            "sample",
            "--teacher",
            home,
            "--prompt",
            "a",
            "--steps",
            1,
            "--num-frames",
            9,
            "--out",
            "c.gif",
        )
        return worked_or_refused(outcome)

    def open_pipeline() -> int:
        from streamvid.teachers.pipeline import PipelineTeacher

        try:
            PipelineTeacher.from_pretrained(str(home))
        except ValueError as error:
            assert "\n" not in str(error), error
            print(f"error: {error}", file=os.sys.stderr)
            return 2
        return 0

    decent(place.finish(place.start(open_pipeline)))


def is_refused(place: Place, damage: Damage, name: str = "student") -> None:
    home = place.part(name)
    damage(home, place)
    outcome = sample(place, home)
    refused(outcome)
    if (place.folder / "clip.gif").exists():
        raise NotHeld("refused, and the clip is there")


def written(file: str, text: str | bytes) -> Damage:
    content = text.encode() if isinstance(text, str) else text
    return lambda home, place: (home / file).write_bytes(content)


def of(file: str, change: Callable[[Path], Any]) -> Damage:
    return lambda home, place: change(home / file)


BAD: dict[str, Damage] = {
    **{
        f"{value} in {part}": of(file, partial(retensored, change=value))
        for part, file in WEIGHTS.items()
        for value in ("nan", "inf")
    },
    **{
        f"{part} {change.__name__}": of(file, change)
        for part, file in WEIGHTS.items()
        for change in (emptied, truncated, Path.unlink)
    },
    **{
        f"{part}, a tensor {change}": of(WEIGHTS[part], partial(retensored, change=change))
        for part in ("transformer", "vae")
        for change in ("missing", "unknown", "shape")
    },
    **{
        f"without {part}/": lambda home, place, part=part: shutil.rmtree(home / part)
        for part in ("transformer", "vae", "text_encoder", "tokenizer")
        if part == "transformer"
    },
    "tokenizer/ alone is missing": lambda home, place: shutil.rmtree(home / "tokenizer"),
    "transformer/config.json is a list": written("transformer/config.json", "[]"),
    "transformer/config.json is no JSON": written("transformer/config.json", "{"),
    "transformer/config.json is deep": written("transformer/config.json", "[" * 100_000),
    "tokenizer.json is emptied": of("tokenizer/tokenizer.json", emptied),
    "tokenizer.json is a list": written("tokenizer/tokenizer.json", "[]"),
    "index with a weight_map of lists": written(
        "transformer/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}'
    ),
    "index whose weight_map is a list": written(
        "transformer/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": [1]}'
    ),
    "index that names a file outside": written(
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        '{"weight_map": {"a": "../../../etc/passwd"}}',
    ),
    "transformer is a link to nothing": lambda home, place: (
        shutil.rmtree(home / "transformer"),
        (home / "transformer").symlink_to("x"),
    ),
    "transformer is a link to itself": lambda home, place: (
        shutil.rmtree(home / "transformer"),
        (home / "transformer").symlink_to("transformer"),
    ),
    "stream_config.json is missing": of("stream_config.json", Path.unlink),
    "stream_config.json is a folder": lambda home, place: (
        (home / "stream_config.json").unlink(),
        (home / "stream_config.json").mkdir(),
    ),
    "stream_config.json is deep": written("stream_config.json", "[" * 100_000),
    "stream_config.json is no text": written("stream_config.json", b"\xff\xfe\x00"),
}
GEOMETRY: dict[str, dict[str, Any]] = {
    "no layers": {"num_layers": 0},
    "10^9 layers": {"num_layers": 10**9},
    "-1 heads": {"num_attention_heads": -1},
    "a text for heads": {"num_attention_heads": "two"},
    "head size 0": {"attention_head_dim": 0},
    "head size 10^9": {"attention_head_dim": 10**9},
    "odd head size": {"attention_head_dim": 7},
    "ffn_dim 10^12": {"ffn_dim": 10**12},
    "patch size 0": {"patch_size": [1, 0, 0]},
    "patch size of two": {"patch_size": [1, 2]},
    "patch size a number": {"patch_size": 2},
    "in_channels 7": {"in_channels": 7},
    "text_dim 63": {"text_dim": 63},
    "eps a text": {"eps": "x"},
    "eps NaN": {"eps": float("nan")},
    "rope_max_seq_len 10^12": {"rope_max_seq_len": 10**12},
    "rope_max_seq_len -1": {"rope_max_seq_len": -1},
    "qk_norm unknown": {"qk_norm": "x"},
    "null sizes": {"num_layers": None, "ffn_dim": None},
}
STREAM: dict[str, dict[str, Any]] = {
    "num_steps 10^9": {"num_steps": 10**9},
    "num_steps 0": {"num_steps": 0},
    "num_steps 1.5": {"num_steps": 1.5},
    "num_steps true": {"num_steps": True},
    "shift NaN": {"shift": float("nan")},
    "shift inf": {"shift": float("inf")},
    "shift a text": {"shift": "8"},
    "chunk_frames 10^9": {"chunk_frames": 10**9},
    "step_table falling wrongly": {"step_table": [[0.1, 0.9]]},
    "step_table with NaN": {"step_table": [[float("nan")]]},
    "step_table deep": {"step_table": [[[1.0]]]},
    "step_table of an empty list": {"step_table": [[]]},
    "context_t 2": {"context_t": 2},
    "order a list": {"order": ["rolling"]},
    "unknown key": {"steps": 4},
    "sink beyond the window": {"sink_frames": 100},
    "commit null": {"commit": None},
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "model_max_length -5": {"model_max_length": -5},
    "model_max_length 0": {"model_max_length": 0},
    "model_max_length a text": {"model_max_length": "many"},
}
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "d_model a text": {"d_model": "64"},
    "d_model 10^9": {"d_model": 10**9},
    "num_layers -1": {"num_layers": -1},
    "vocab_size 1": {"vocab_size": 1},
    "model_type t6": {"model_type": "t6"},
}
VAES: dict[str, dict[str, Any]] = {
    "unknown class": {"_class_name": "AutoencoderNothing"},
    "class is a list": {"_class_name": ["os", "system"]},
}


def link_in_components(place: Place) -> None:
    """An export copies no file from outside of the folder that it was told to take."""
    home = place.part("teacher")
    secret = place.folder / "secret.txt"
    secret.write_text("the secret")
    (home / "vae" / "notes.txt").symlink_to(secret)
    outcome = place.run(
        "train", "--config", place.parts / "run.yaml", f"components={home}", "train.max_steps=1"
    )
    worked_or_refused(outcome)
    copied = place.folder / "runs" / "run" / "student" / "vae" / "notes.txt"
    if copied.is_file() and copied.read_text() == "the secret":
        raise NotHeld("a file outside of the components is copied into the export")


def nan_is_not_exported(place: Place, file: str) -> None:
    """A run whose average or weights are spoilt does not end with an export as if nothing were."""
    run = shutil.copytree(place.parts / "done", place.folder / "runs" / "run")
    retensored(run / "checkpoints" / "step-0000004" / file, "nan")
    before = (run / "student" / WEIGHTS["transformer"]).read_bytes()
    outcome = place.run("train", "--config", place.parts / "run.yaml")
    refused(outcome)
    if (run / "student" / WEIGHTS["transformer"]).read_bytes() != before:
        raise NotHeld("the export was replaced")


def export_is_left_alone(place: Place) -> None:
    """The same command on a finished run leaves what its owner has put beside the export."""
    run = shutil.copytree(place.parts / "done", place.folder / "runs" / "run")
    (run / "student" / "notes.txt").write_text("mine")
    worked_or_refused(place.run("train", "--config", place.parts / "run.yaml"))
    if not (run / "student" / "notes.txt").is_file():
        raise NotHeld("a file of the user's is gone")


def quickstart_removes_nothing(place: Place) -> None:
    thesis = place.folder / "mine" / "quickstart" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    refused(
        place.run(
            "quickstart",
            "--output-dir",
            place.folder / "mine",
            "--minutes",
            0.001,
            "--num-prompts",
            1,
        )
    )
    if not thesis.is_file():
        raise NotHeld("a file of the user's is gone")


def card_is_text(place: Place, name: str) -> None:
    """A name of a run is no markup of its card."""
    outcome = place.run(
        "train", "--config", place.parts / "run.yaml", "train.max_steps=1", f"train.name={name}"
    )
    worked_or_refused(outcome)
    for card in place.folder.rglob("README.md"):
        if name in card.read_text():
            raise NotHeld("the card has the name as it is")


def readable(place: Place) -> None:
    """Weights are as readable as the umask says."""
    worked(place.run("train", "--config", place.parts / "run.yaml", "train.max_steps=1"))
    tight = [
        file.name
        for file in (place.folder / "runs").rglob("*.safetensors")
        if file.stat().st_mode & 0o777 != 0o644
    ]
    if tight:
        raise NotHeld(
            f"{tight[0]} and {len(tight) - 1} more can't be read by others under umask 022"
        )


def cases() -> list[Case]:
    found = [
        Case(AREA, f"code: {name}", partial(code_is_not_run, damage=damage))
        for name, damage in CODE.items()
    ]
    for name, (values, files) in INDEXES.items():
        for use in ("teacher", "pipeline"):
            run = partial(index_runs_no_code, values=values, files=files, use=use)
            found.append(Case(AREA, f"code: model_index.json, {name}, as {use}", run))
    found += [Case(AREA, name, partial(is_refused, damage=damage)) for name, damage in BAD.items()]
    for title, file, table in (
        ("geometry", "transformer/config.json", GEOMETRY),
        ("stream_config.json", "stream_config.json", STREAM),
        ("tokenizer", TOKENIZER, TOKENIZERS),
        ("text encoder", "text_encoder/config.json", TEXT_ENCODERS),
        ("vae", "vae/config.json", VAES),
    ):
        found += [
            Case(AREA, f"{title}: {name}", partial(is_refused, damage=set_json(file, **values)))
            for name, values in table.items()
        ]
    found.append(Case(AREA, "a link in components", link_in_components))
    for file in ("student.ema.safetensors", "student.safetensors"):
        found.append(
            Case(AREA, f"NaN in {file} of a finished run", partial(nan_is_not_exported, file=file))
        )
    found.append(Case(AREA, "a file in the export of a finished run", export_is_left_alone))
    found.append(Case(AREA, "quickstart where something else lies", quickstart_removes_nothing))
    for name in (
        "<img src=x onerror=alert(1)>",
        "x\n---\nlicense: mit",
        "[a](javascript:alert(1))",
    ):
        found.append(Case(AREA, f"card: {json.dumps(name)}", partial(card_is_text, name=name)))
    found.append(Case(AREA, "export under umask 022", readable))
    return found
