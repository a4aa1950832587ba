"""Prompts, prompt files, places for clips, and the flags of `streamvid sample`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.reliability.runner import (
    Case,
    NotHeld,
    Outcome,
    Place,
    decent,
    refused,
    worked,
    worked_or_refused,
)

AREA = "prompts and flags of sample.py"


def sample(place: Place, **flags: Any) -> Outcome:
    """One small clip of the tiny student, with other flags; True is a flag without a value, None
    leaves one out.
    """
    given = {
        "student": place.parts / "student",
        "prompt": "a red circle",
        "num_frames": 5,
        "size": "16x16",
        "out": "c.gif",
        **flags,
    }
    command: list[object] = []
    for name, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", *(() if value is True else values)]
    return place.run("sample", *command)


PROMPTS: dict[str, str] = {
    "an escape": "a \x1b[31mred circle",
    "new lines": "a red\ncircle\r\nmoves",
    "100,000 words": "red " * 100_000,
    "one word of 100,000 letters": "r" * 100_000,
    "right to left": "دائرة حمراء \u202e sdrawkcab",
    "emoji": "👩‍👩‍👧‍👦" * 50,
    "combining marks": "a" + "\u0301" * 5000,
    "NUL": "a\u2400b",
    "HTML": "<script>alert(1)</script> &amp;amp;amp; &#x1b;[31m",
    "a format": "{} {0} %s %(x)s ${HOME} $(touch CODE_RAN) `touch CODE_RAN`",
    "a path": "../../etc/passwd",
    "special tokens": "</s><pad><unk><extra_id_0>",
    "a dash": "- a red circle",
    "wrongly decoded": "cafÃ© rÃ©d",
    "U+2028": "a red\u2028circle",
}
FILES: dict[str, tuple[bytes, int | None]] = {
    "CRLF": (b"a red circle\r\na blue square\r\n", 2),
    "old Mac": (b"a red circle\ra blue square", None),
    "a byte order mark": (b"\xef\xbb\xbfa red circle\n", 1),
    "UTF-16": ("a red circle\n".encode("utf-16"), 0),
    "UTF-16 without a mark": ("a red circle\n".encode("utf-16-le"), 0),
    "latin-1": ("ein roter Kreis für\n".encode("latin-1"), 0),
    "U+2028 in a prompt": ("a red\u2028circle\n".encode(), 1),
    "U+0085 in a prompt": ("a red\x85circle\n".encode(), 1),
    "a form feed in a prompt": (b"a red\x0ccircle\n", 1),
    "a vertical tab in a prompt": (b"a red\x0bcircle\n", 1),
    "NUL": (b"a red\x00circle\n", None),
    "an escape": (b"a \x1b[31mred circle\n", 1),
    "empty": (b"", 0),
    "blank lines": (b"\n  \n\t\n", 0),
    "comments only": (b"# a\n# b\n", 0),
    "no new line at the end": (b"a red circle", 1),
    "random bytes": (bytes(range(128, 256)), 0),
    "a million letters": (b"r" * 1_000_000, None),
}
"""By name: the bytes, and the clips; 0 is a refusal, None either."""

REFUSED: dict[str, dict[str, Any]] = {
    "prompt empty": {"prompt": ""},
    "prompt of spaces": {"prompt": "  \t "},
    "student empty": {"student": ""},
    "student nowhere": {"student": "nowhere"},
    "teacher empty": {"student": None, "teacher": ""},
    "teacher nowhere": {"student": None, "teacher": "nowhere"},
    "student and teacher": {"teacher": "x"},
    "components empty": {"components": ""},
    "components nowhere": {"student": "START", "components": "nowhere"},
    "codec empty": {"codec": ""},
    "codec nowhere": {"codec": "nowhere"},
    "prompt and prompts": {"prompts": "p.txt"},
    "prompts empty": {"prompt": None, "prompts": ""},
    "prompts nowhere": {"prompt": None, "prompts": "nowhere.txt"},
    "prompts a folder": {"prompt": None, "prompts": "."},
    "out empty": {"out": ""},
    "out of an unknown suffix": {"out": "clip.avi"},
    "out in /proc": {"out": "/proc/x/clip.gif"},
    "out is a folder": {"out": ".", "prompt": "x"},
    "out is a device": {"out": "/dev/full/clip.gif"},
    "out below a file": {"out": "FILE/clip.gif"},
    "out of 300 letters": {"out": "n" * 300 + ".gif"},
    "frames 0": {"num_frames": 0},
    "frames -1": {"num_frames": -1},
    "frames a text": {"num_frames": "many"},
    "frames 1.5": {"num_frames": 1.5},
    "frames 2": {"num_frames": 2},
    "steps 0": {"steps": 0},
    "steps -1": {"steps": -1},
    "steps 10^9": {"steps": 10**9},
    "schedule unknown": {"schedule": "backwards"},
    "schedule empty": {"schedule": ""},
    "schedule a folder": {"schedule": "."},
    "window 0": {"window": 0},
    "window -1": {"window": -1},
    "sink -1": {"sink": -1},
    "sink beyond the window": {"sink": 100},
    "guidance of a student": {"guidance": 2},
    "guidance NaN of a teacher": {
        "student": None,
        "teacher": "TEACHER",
        "guidance": "nan",
        "steps": 1,
    },
    "guidance 1e999 of a teacher": {
        "student": None,
        "teacher": "TEACHER",
        "guidance": "1e999",
        "steps": 1,
    },
    "window of a teacher": {"student": None, "teacher": "TEACHER", "window": 3},
    "steps 0 of a teacher": {"student": None, "teacher": "TEACHER", "steps": 0},
    "fps 0": {"fps": 0},
    "fps -1": {"fps": -1},
    "fps NaN": {"fps": "nan"},
    "fps inf": {"fps": "inf"},
    "fps 1e-300": {"fps": "1e-300"},
    "fps 1e300 of .mp4": {"fps": "1e300", "out": "c.mp4"},
    "size 0": {"size": "0x0"},
    "size -64": {"size": "-64x-64"},
    "size 7": {"size": "7x7"},
    "size 10^6": {"size": "1000000x1000000"},
    "size of one": {"size": "16"},
    "size of two words": {"size": (16, 16)},
    "size a text": {"size": "axb"},
    "device unknown": {"device": "tpu7"},
    "device meta": {"device": "meta"},
    "device mps": {"device": "mps"},
    "device cuda:99": {"device": "cuda:99"},
    "device empty": {"device": ""},
    "dtype unknown": {"dtype": "fp8"},
    "seed a text": {"seed": "x"},
    "seed 1.5": {"seed": 1.5},
    "unknown flag": {"no_such_flag": True},
    "an escape in a file's name": {"student": "\x1b[31mred"},
    "a new line in a file's name": {"student": "a\nerror: all is lost"},
    "an escape in a place": {"out": "\x1b[31mred.avi"},
}
WORKS: dict[str, dict[str, Any]] = {
    "1 frame": {"num_frames": 1},
    "seed -1": {"seed": -1},
    "seed 10^30": {"seed": 10**30},
    ".webm": {"out": "c.webm"},
    "PNGs": {"out": "pngs"},
    "a folder to be made": {"out": "a/b/c/clip.gif"},
    "bf16": {"dtype": "bf16"},
    "a stream": {"stream": True, "out": "pngs"},
    "spaces and umlauts in the name": {"out": "ein schöner clip ÄÖ.gif"},
    "an escape in the name": {"out": "\x1b[31mred.gif"},
}
EITHER = ("seed -1", "seed 10^30", "an escape in the name")


def flags_of(place: Place, flags: dict[str, Any]) -> dict[str, Any]:
    (place.folder / "FILE").write_text("x")
    (place.folder / "p.txt").write_text("a red circle\n")
    names = {"START": place.parts / "start", "TEACHER": place.parts / "teacher"}
    return {
        name: names.get(value, value) if isinstance(value, str) else value
        for name, value in flags.items()
    }


def is_refused(place: Place, flags: dict[str, Any]) -> None:
    refused(sample(place, **flags_of(place, flags)))


def works(place: Place, flags: dict[str, Any], either: bool) -> None:
    outcome, file = sample(place, **flags), place.folder / flags.get("out", "c.gif")
    (worked_or_refused if either else worked)(outcome, file)


def with_prompt(place: Place, prompt: str) -> None:
    worked_or_refused(sample(place, prompt=prompt, num_frames=1), place.folder / "c.gif")


def with_file(place: Place, content: bytes, clips: int | None) -> None:
    (place.folder / "prompts.txt").write_bytes(content)
    outcome = sample(place, prompt=None, prompts="prompts.txt", num_frames=1, out="clips/{}.gif")
    if clips == 0:
        return refused(outcome)
    if clips is None:
        return worked_or_refused(outcome)
    worked(outcome)
    made = len(list((place.folder / "clips").glob("*.gif")))
    if made != clips:
        raise NotHeld(f"{made} clips of {clips} prompts")


def long_prompts_differ(place: Place) -> None:
    """A prompt that is cut is not cut silently: its end is seen, or one line tells of it."""
    start = "a red circle moves up " * 40
    ends = [f"{start} and a blue square", f"{start} and a green triangle"]
    outcomes = [
        sample(place, prompt=prompt, num_frames=1, out=f"{index}.gif")
        for index, prompt in enumerate(ends)
    ]
    for outcome in outcomes:
        worked(outcome)
    same = (place.folder / "0.gif").read_bytes() == (place.folder / "1.gif").read_bytes()
    if same and not all("token" in outcome.err for outcome in outcomes):
        raise NotHeld("the ends of two long prompts are left out without a word")


def keeps_what_is_there(
    place: Place, out: str, make: Callable[[Place], None], flags: dict[str, Any]
) -> None:
    """A refusal leaves a clip that was there as it was."""
    make(place)
    before = (place.folder / out).read_bytes()
    refused(sample(place, out=out, **flags))
    if (place.folder / out).read_bytes() != before:
        raise NotHeld("the clip that was there is changed")


def fifo_as_prompts(place: Place) -> None:
    os.mkfifo(place.folder / "fifo")
    refused(sample(place, prompt=None, prompts="fifo"))


def endless_stream_is_stopped(place: Place) -> None:
    """--num-frames 0 goes on until Ctrl-C, which keeps what there is."""
    import signal

    from tests.reliability.runner import Stroke

    stroke = Stroke(signal.SIGINT, "os.rename", r"pngs/000008\.png")
    outcome = place.run(
        "sample",
        "--student",
        place.parts / "student",
        "--prompt",
        "a",
        "--num-frames",
        0,
        "--stream",
        "--size",
        "16x16",
        "--out",
        "pngs",
        stroke=stroke,
    )
    decent(outcome)
    kept = list((place.folder / "pngs").glob("[0-9]*.png"))
    if outcome.code not in (0, 130) or len(kept) < 5:
        raise NotHeld(f"{len(kept)} frames kept, {outcome.said()}")


def cases() -> list[Case]:
    found = [
        Case(AREA, f"prompt: {name}", partial(with_prompt, prompt=text))
        for name, text in PROMPTS.items()
    ]
    found += [
        Case(AREA, f"file: {name}", partial(with_file, content=text, clips=num))
        for name, (text, num) in FILES.items()
    ]
    found += [Case(AREA, name, partial(is_refused, flags=flags)) for name, flags in REFUSED.items()]
    found += [
        Case(AREA, f"works: {name}", partial(works, flags=flags, either=name in EITHER))
        for name, flags in WORKS.items()
    ]
    there = partial(
        keeps_what_is_there,
        out="mine.gif",
        make=lambda place: (place.folder / "mine.gif").write_bytes(b"mine"),
        flags={"steps": -1},
    )
    found.append(Case(AREA, "a clip is there already", there))
    found.append(Case(AREA, "file: a FIFO", fifo_as_prompts))
    found.append(Case(AREA, "two long prompts with other ends", long_prompts_differ))
    found.append(Case(AREA, "an endless stream and Ctrl-C", endless_stream_is_stopped))
    return found
