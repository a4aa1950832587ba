"""Every setting of a run with values that it should not have: empty, null, out of range, of another
type, misspelt.
"""

from __future__ import annotations

from functools import partial

from tests.reliability.runner import Case, Place, refused, worked

AREA = "overrides"
# Of each key the values that are refused: of a dry run, which builds no network and trains nothing.
REFUSED: dict[str, tuple[str, ...]] = {
    "train.name": (
        "",
        "null",
        "a/b",
        "..",
        ".",
        "x\n---\nlicense: mit",
        "<img src=x>",
        "\x1b[31mred",
    ),
    "train.output_dir": ("", "null"),
    "train.seed": ("", "null", "-1", "1.5", "x", "1e400"),
    "train.max_steps": ("", "null", "0", "-1", "1.5", "x", "1e999", "true"),
    "train.max_minutes": ("", "0", "-1", "1:30", "nan", "inf", "x", "1e999"),
    "train.batch_size": ("", "0", "-1", "x", "1e12", "1e999"),
    "train.log_every": ("0", "-1", "null"),
    "train.save_every": ("0", "-1", "null"),
    "train.keep_checkpoints": ("0", "-1", "null"),
    "train.mixed_precision": ("", "bf32", "null", "true"),
    "train.shard": ("half", "null"),
    "train.compile": ("", "maybe", "null", "1"),
    "train.trackers": ("x", "[nothing]"),
    "train.optimizers.student.lr": ("", "null", "-1", "x", "1e400", "nan", "inf"),
    "train.optimizers.student.betas": ("[1]", "[0.9, 2]", "x", "[nan, 0.9]"),
    "train.optimizers.student.kind": ("adam", "null"),
    "train.optimizers.student.weight_decay": ("-1", "nan"),
    "train.optimizers.student.accumulate": ("0", "-1", "1.5"),
    "train.optimizers.student.warmup_steps": ("-1", "x"),
    "train.optimizers.student.clip_norm": ("-1", "nan", "0"),
    "train.optimizers.nobody.lr": ("1",),
    "train.ema.student.decay": ("2", "-1", "nan", "x"),
    "train.ema.nobody.decay": ("0.5",),
    "train.lr": ("1",),
    "trian.seed": ("1",),
    "objective": ("", "null", "nothing", "base", "../dmd", "os"),
    "student.path": ("", "nowhere"),
    "student.kind": ("", "diagonal"),
    "student.lora.rank": ("-1", "1e9", "x", "1.5"),
    "student.geometry.num_layers": ("x", "-1", "1.5"),
    "teacher.path": ("", "null", "nowhere"),
    "teacher.dtype": ("fp8", ""),
    "components": ("", "null"),
    "prompt_cache": ("",),
    "data.kind": ("", "video", "null"),
    "data.num_prompts": ("0", "-1", "x", "1e999"),
    "data.path": ("",),
    "latent_size": ("[0, 0]", "[-8, 8]", "8", "[8]", "[8, 8, 8]", "[1e999, 8]", "[3, 3]"),
    "rollout.num_chunks": ("0", "-1", "x", "1e999"),
    "options.guidance_scale": ("nan", "x", "1e999"),
    "options.shift": ("0", "-1", "nan"),
    "options.fake_updates_per_student": ("0", "-1"),
    "stream.num_steps": ("0", "-1", "null", "x", "1e999"),
    "stream.shift": ("0", "-1", "nan", "inf"),
    "stream.chunk_frames": ("0", "-1", "x"),
    "stream.window_frames": ("0", "-1", "null"),
    "stream.step_table": ("[[0.1, 0.9]]", "[[2]]", "x"),
    "stream.order": ("backwards",),
}
FORMS = (
    "",
    "=",
    "=1",
    ".=1",
    "train..seed=1",
    "train.seed",
    "train=1",
    "train.seed.x=1",
    "train.seed={a: 1}",
    "--train.seed=1",
    "train.seed=[1",
    "train.seed=${nowhere}",
    "train.name=${train.name}",
    "a" * 100_000 + "=1",
    "\x1b[31m=1",
    "train.seed=" + "9" * 5000,
    "train.name=" + "n" * 300,
)
DRY_RUN_WORKS = (
    "train.max_steps=1e9",
    "train.name=007",
    "data.path=null",
    "prompt_cache=null",
    "train.max_minutes=null",
    "train.seed=1e3",
    "train.mixed_precision=no",
    "data.path=nowhere.txt",
)
# Refused before any network is loaded or prompt encoded: the same as in a dry run.
EARLY = (
    "train.seed=-1",
    "train.output_dir=/proc/x",
    "train.name=a/b",
    "train.batch_size=1e12",
    "latent_size=[0, 0]",
    "student.path=",
    "components=nowhere",
    "data.path=nowhere.txt",
)


def dry_run(place: Place, override: str) -> None:
    refused(place.run("train", "--config", place.parts / "run.yaml", "--dry-run", override))


def dry_run_works(place: Place, override: str) -> None:
    worked(place.run("train", "--config", place.parts / "run.yaml", "--dry-run", override))


def run_is_refused(place: Place, override: str) -> None:
    refused(place.run("train", "--config", place.parts / "run.yaml", override))


def shown(override: str) -> str:
    return repr(override if len(override) < 60 else override[:40] + "...")


def cases() -> list[Case]:
    pairs = [f"{key}={value}" for key, values in REFUSED.items() for value in values]
    found = [
        Case(AREA, f"dry run: {shown(text)}", partial(dry_run, override=text))
        for text in (*pairs, *FORMS)
    ]
    found += [
        Case(AREA, f"dry run works: {text}", partial(dry_run_works, override=text))
        for text in DRY_RUN_WORKS
    ]
    return found + [
        Case(AREA, f"run: {text}", partial(run_is_refused, override=text)) for text in EARLY
    ]
