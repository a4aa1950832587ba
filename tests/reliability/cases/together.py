"""Two runs of one name, variables that are empty, and one pipeline in several threads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

from tests.reliability.cases.weights import sample
from tests.reliability.runner import (
    Case,
    NotHeld,
    Place,
    Stroke,
    refused,
    worked,
    worked_or_refused,
)

NAMES, VARIABLES, THREADS = "two runs of one name", "environment variables", "threads"


def command(place: Place, *overrides: str) -> list[object]:
    return ["--config", place.parts / "run.yaml", "train.max_steps=6", *overrides]


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def stopped_at(place: Place, event: str, pattern: str) -> tuple[int, Path]:
    """A run that has stopped itself, as by Ctrl-Z, in the midst of something."""
    started = place.start(
        "train", *command(place), stroke=Stroke(signal.SIGSTOP, event, pattern, 1)
    )
    while Path(f"/proc/{started[0]}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        if os.waitpid(started[0], os.WNOHANG)[0]:
            raise NotHeld("the first run ended before its event")
        time.sleep(0.02)
    return started


def second_is_refused(place: Place, event: str, pattern: str, *overrides: str) -> None:
    """While one run trains, another of its name is refused in a line; the first ends as if
    alone.
    """
    first = stopped_at(place, event, pattern)
    try:
        second = place.run("train", *command(place, *overrides))
    finally:
        os.kill(first[0], signal.SIGCONT)
    outcome = place.finish(first)
    refused(second)
    worked(outcome)
    if steps_of(place.folder / "runs" / "run") != [1, 2, 3, 4, 5, 6]:
        raise NotHeld(f"metrics.jsonl has the steps {steps_of(place.folder / 'runs' / 'run')}")


def at_once(place: Place) -> None:
    """Two that start together: one trains, one is refused."""
    both = [place.start("train", *command(place)) for _ in range(2)]
    outcomes = sorted((place.finish(started) for started in both), key=lambda outcome: outcome.code)
    worked(outcomes[0])
    if steps_of(place.folder / "runs" / "run") != [1, 2, 3, 4, 5, 6]:
        raise NotHeld(f"metrics.jsonl has the steps {steps_of(place.folder / 'runs' / 'run')}")
    if outcomes[1].code:  # or it came when the first was done
        refused(outcomes[1])


def after_a_kill(place: Place) -> None:
    """A killed run keeps nobody out."""
    first = place.run(
        "train", *command(place), stroke=Stroke(signal.SIGKILL, "open", r"metrics\.jsonl", 2)
    )
    if first.code != -signal.SIGKILL:
        raise NotHeld(f"the case's event did not come: {first.said()}")
    worked(place.run("train", *command(place)))


def other_names_at_once(place: Place) -> None:
    both = [place.start("train", *command(place, f"train.name={name}")) for name in "ab"]
    for started in both:
        worked(place.finish(started))


def shared_cache(place: Place) -> None:
    """Two processes fill one prompt cache and one latent set."""
    shared = ["prompt_cache=prompts"]
    both = [place.start("train", *command(place, f"train.name={name}", *shared)) for name in "ab"]
    for started in both:
        worked(place.finish(started))


def read_while_replaced(place: Place) -> None:
    """A student folder can be opened at any time while exports replace it."""
    home = place.part("student")

    def replace_often() -> int:
        from streamvid.files import atomic_folder

        for _ in range(30):
            with atomic_folder(home) as temporary:
                shutil.copytree(place.parts / "student", temporary, dirs_exist_ok=True)
        return 0

    def open_often() -> int:
        from streamvid.students.folder import load_student

        missing = 0
        for _ in range(30):
            try:
                load_student(home)
            except ValueError:  # between two renames there is no folder; one line says so
                missing += 1
        print(missing)
        return 0

    writer, reader = place.start(replace_often), place.start(open_often)
    for outcome in (place.finish(reader), place.finish(writer)):
        worked(outcome)


# ---- variables -----------------------------------------------------------------------------------


def with_variables(place: Place, variables: dict[str, str | None]) -> None:
    """A training with other variables."""

    def run() -> int:
        from streamvid.cli import train

        for name, value in variables.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        return train.main([str(word) for word in command(place)])

    worked_or_refused(place.finish(place.start(run)))


def unset(place: Place, override: str) -> None:
    """`key=$UNSET` of a shell is `key=`; it is refused, not taken for null."""
    refused(place.run("train", *command(place, override)))


# ---- threads -------------------------------------------------------------------------------------


def in_threads(place: Place, body: str) -> None:
    outcome = place.finish(place.start(lambda: THREADED[body](place)))
    worked(outcome)


def same_as_alone(place: Place) -> int:
    """Clips of one pipeline in four threads are those that it makes alone."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    pipe = _pipeline(place)
    alone = [_clip(pipe, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: _clip(pipe, seed), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together)), "clips differ"
    return 0


def interrupt_of_one(place: Place) -> int:
    """An interrupt in one call's callback ends that call alone."""
    from concurrent.futures import ThreadPoolExecutor

    pipe = _pipeline(place)

    def stop(pipe, step, t, kwargs):  # noqa: ANN001, ANN202
        pipe._interrupt = True
        return kwargs

    whole = _clip(pipe, 0).shape[1]
    with ThreadPoolExecutor(3) as pool:
        stopping = pool.submit(_clip, pipe, 0, callback_on_step_end=stop)
        others = [pool.submit(_clip, pipe, seed) for seed in (1, 2)]
        lengths = [future.result().shape[1] for future in others]
        stopping.result()
    assert lengths == [whole, whole], f"other calls were cut to {lengths} of {whole} frames"
    return 0


def many_streams(place: Place) -> int:
    """Streams that are begun and left, in fresh threads, leave no memory behind."""
    import threading

    import psutil

    pipe = _pipeline(place)

    def begin() -> None:
        _clip(pipe, 0)

    sizes = []
    for _ in range(30):
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()
        sizes.append(psutil.Process().memory_info().rss / 2**20)
    assert sizes[-1] - sizes[9] < 50, f"memory grew from {sizes[9]:.0f} to {sizes[-1]:.0f} MB"
    return 0


def two_models_at_once(place: Place) -> int:
    """Two threads that each open the student and stream it."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: _clip(_pipeline(place), 5), range(2))
    assert torch.equal(one, two), "clips differ"
    return 0


def _pipeline(place: Place):  # noqa: ANN202
    from streamvid.students.pipeline import StreamVidPipeline

    pipe = StreamVidPipeline.from_pretrained(place.parts / "student")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _clip(pipe, seed: int, **options: object):  # noqa: ANN001, ANN202
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = pipe(
        "a red circle",
        height=16,
        width=16,
        num_frames=33,
        generator=generator,
        output_type="pt",
        **options,
    )
    return made.frames


THREADED = {
    "the same as alone": same_as_alone,
    "an interrupt in one": interrupt_of_one,
    "thirty threads": many_streams,
    "two pipelines": two_models_at_once,
}


def cases() -> list[Case]:
    found = [
        Case(
            NAMES,
            "while it trains",
            partial(second_is_refused, event="open", pattern=r"metrics\.jsonl"),
        ),
        Case(
            NAMES,
            "while it writes a checkpoint",
            partial(second_is_refused, event="os.mkdir", pattern=r"\.step-0000002\.tmp-"),
        ),
        Case(
            NAMES,
            "while it exports",
            partial(second_is_refused, event="os.mkdir", pattern=r"run/\.student\.tmp-"),
        ),
        Case(NAMES, "both at once", at_once),
        Case(NAMES, "after a kill", after_a_kill),
        Case(NAMES, "other names at once", other_names_at_once),
        Case(NAMES, "one prompt cache for two", shared_cache),
        Case(NAMES, "a student that is read while it is replaced", read_while_replaced),
    ]
    for name, variables in {
        "HOME is not set": {"HOME": None},
        "HOME is empty": {"HOME": ""},
        "TMPDIR is nowhere": {"TMPDIR": "/nowhere"},
        "OMP_NUM_THREADS is a text": {"OMP_NUM_THREADS": "many"},
        "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"},
        "WORLD_SIZE is a text": {"WORLD_SIZE": "many"},
        "MASTER_PORT alone": {"MASTER_PORT": "29500"},
    }.items():
        found.append(Case(VARIABLES, name, partial(with_variables, variables=variables)))
    for key in (
        "student.path",
        "teacher.path",
        "components",
        "train.output_dir",
        "train.name",
        "prompt_cache",
        "data.path",
    ):
        found.append(Case(VARIABLES, f"{key}=$UNSET", partial(unset, override=f"{key}=")))
    found.append(Case(VARIABLES, '--student "$UNSET"', lambda place: refused(sample(place, ""))))
    return found + [Case(THREADS, name, partial(in_threads, body=name)) for name in THREADED]
