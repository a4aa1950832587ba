"""Command lines of the other tools: values out of range, places that can't be written, teachers
that are none.
"""

from __future__ import annotations

from functools import partial

from tests.reliability.runner import Case, Place, refused, worked

AREA = "command lines"
# Words in capitals stand for what is made in `line_of`.
REFUSED: tuple[str, ...] = (
    "train",
    "train --config",
    "train --config RUN --nothing",
    "train train.seed=1",
    "train --dry-run",
    "evaluate",
    "evaluate --out r.txt",
    "evaluate --out .",
    "evaluate --out /proc/x/r.json",
    "evaluate --out FILE/r.json",
    "evaluate --out r.json --num-prompts 0",
    "evaluate --out r.json --num-prompts -1",
    "evaluate --out r.json --num-prompts 1e9",
    "evaluate --out r.json --seeds x",
    "evaluate --out r.json --long -1",
    "evaluate --out r.json --student nowhere",
    "evaluate --out r.json --student ''",
    "evaluate --out r.json --teacher nowhere",
    "evaluate --out r.json --teacher ''",
    "evaluate --out r.json --teacher-steps 0",
    "evaluate --out r.json --teacher-steps x",
    "evaluate --out r.json --teacher-steps -5",
    "evaluate --out r.json --label a",
    "evaluate --out r.json --suite moon",
    "evaluate --out r.json --device tpu",
    "evaluate --out r.json --device meta",
    "evaluate --out r.json --num-prompts 1 --num-frames 0",
    "evaluate --out r.json --num-prompts 1 --num-frames 31",
    "evaluate --out r.json --num-prompts 1 --guidance nan",
    "evaluate --out r.json --student STUDENT --student STUDENT --label a --label a",
    "bench",
    "bench --suite stream",
    "bench --suite stream --out r.txt",
    "bench --suite stream --out r.json --steps 0",
    "bench --suite stream --out r.json --steps x",
    "bench --suite stream --out r.json --repeats 0",
    "bench --suite stream --out r.json --device gpu",
    "bench --suite stream --out r.json --device tpu",
    "bench --suite stream --out r.json --device cuda:9",
    "bench --suite stream --out r.json --cases wide",
    "bench --suite stream --out r.json --against fast",
    "bench --suite stream --out r.json --ages 0",
    "bench --suite stream --out r.json --student nowhere",
    "bench --suite stream --out r.json --size 7x7",
    "bench --suite stream --out r.json --size 0x0",
    "bench --suite losses --out r.json --latent-shape 0x1x1x1",
    "bench --suite losses --out r.json --latent-shape -1x2x3x4",
    "bench --suite losses --out /proc/x/r.json",
    "bench --suite losses --out r.json --latent-shape 1000000x1000000x1000x1000",
    "convert",
    "convert FILE --from wan --to out",
    "convert nowhere.pt --from wan --to out",
    "convert . --from wan --to out",
    "convert nowhere.pt --from moon --to out",
    "convert TEACHER/transformer --from wan --to HOME",
    "convert '' --from wan --to out",
    "convert TEACHER/transformer --from wan --to FILE",
    "convert TEACHER/transformer --from wan --to /proc/x",
    "convert TEACHER/transformer --from wan --to out --lora nowhere.pt",
    "convert TEACHER/transformer --from wan --to out --components nowhere",
    "trajectories",
    "trajectories --out FILE",
    "trajectories --out /proc/x",
    "trajectories --out t --num-clips 0",
    "trajectories --out t --teacher nowhere",
    "trajectories --out t --teacher ''",
    "trajectories --out t --device cuda",
    "trajectories --out t --device tpu",
    "trajectories --out t --num-clips 1 --latent-size 7x7",
    "trajectories --out t --num-clips 1 --latent-size 0x0",
    "trajectories --out t --num-clips 1 --steps 0",
    "trajectories --out t --num-clips 1 --student-steps 0",
    "trajectories --out t --num-clips 1 --shift -1",
    "trajectories --out t --num-clips 1 --times 1,x",
    "trajectories --out t --num-clips 1 --times 0.5,0.9",
    "trajectories --teacher TEACHER --out t --num-clips 1 --guidance nan",
    "trajectories --out t --num-clips 1 --prompts nowhere.txt",
    "trajectories --out t --num-clips 1 --latent-frames 0",
    "trajectories --out t --num-clips 1 --batch-size 0",
    "quickstart --minutes 0 --output-dir out",
    "quickstart --minutes -1 --output-dir out",
    "quickstart --minutes nan --output-dir out",
    "quickstart --minutes 0.001 --num-prompts 0 --output-dir out",
    "quickstart --minutes 0.001 --num-prompts -1 --output-dir out",
    "quickstart --minutes 0.001 --num-prompts 1 --output-dir FILE",
    "quickstart --minutes 0.001 --num-prompts 1 --output-dir /proc/x",
    "quickstart --minutes x",
)
HELPED = ("train", "sample", "evaluate", "bench", "convert", "trajectories", "quickstart")


def line_of(place: Place, text: str) -> list[str]:
    """The words of a command line."""
    import shlex

    (place.folder / "FILE").write_text("x")
    (place.folder / "HOME").mkdir()
    (place.folder / "HOME" / "thesis.txt").write_text("mine")
    made = {
        "RUN": place.parts / "run.yaml",
        "TEACHER": place.parts / "teacher",
        "STUDENT": place.parts / "student",
    }
    for name, path in made.items():
        text = text.replace(name, str(path))
    return shlex.split(text)


def is_refused(place: Place, text: str) -> None:
    refused(place.run(*line_of(place, text)))


def helps(place: Place, tool: str) -> None:
    worked(place.run(tool, "--help"))


def cases() -> list[Case]:
    found = [Case(AREA, text, partial(is_refused, text=text)) for text in REFUSED]
    return found + [Case(AREA, f"{tool} --help", partial(helps, tool=tool)) for tool in HELPED]
