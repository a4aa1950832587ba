"""What all commands share: options that are not empty, one line for a mistake, and ends that clean
up.
"""

import argparse
import logging
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from streamvid.command_line import (
    Parser,
    counts,
    in_repository,
    invocation,
    log_to_stderr,
    names_of,
    run_tool,
    seeds,
    sides,
)


def parser(**options) -> Parser:
    made = Parser("Does it.", **options)
    made.add_argument("--student")
    made.add_argument("--label", action="append")
    made.add_argument("--redo", default="")
    made.add_argument("rest", nargs="*")
    return made


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--student", ""], "student"),
        (["--student="], "student"),
        (["--label", "a", "--label", " "], "label"),
        (["a", ""], "rest"),
    ],
)
def test_an_empty_text_is_no_option(capsys, argv, name):
    """`--student "$UNSET"` once sampled the shipped student."""
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(argv)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and error.startswith(f"error: --{name} is an empty text")
        and error.count("\n") == 1
    )


def test_where_an_empty_text_means_something_it_is_taken():
    assert (
        parser(may_be_empty=["student"]).parse_args(["--student", "", "--redo", ""]).student == ""
    )


def test_an_unknown_option_is_one_line_without_escapes(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--stu\x1b[31m=x"])
    assert "\x1b" not in (error := capsys.readouterr().err) and error.count("\n") == 1


def fail(error):
    raise error


@pytest.mark.parametrize(
    "error, said",
    [
        (
            ValueError("no clip a\nerror: all is lost\x1b[31m.mp4"),
            r"error: no clip a error: all is lost\x1b[31m.mp4",
        ),
        (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'"),
        (MemoryError(), "error: there is not enough memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "error: there is not enough memory (CUDA out of memory. Tried)",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "error: there is not enough memory",
        ),
    ],
)
def test_a_mistake_is_one_line(capsys, error, said):
    assert run_tool(lambda: fail(error)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(said) and shown.count("\n") == 1 and "\x1b" not in shown


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run_tool(lambda: fail(RuntimeError("shapes do not match")))


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interruption_cleans_up_and_is_one_line(capsys, number, code):
    cleaned = []

    def job():
        try:
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 5)  # until the handler has run
        finally:
            cleaned.append(True)

    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    came_with = signal.signal(number, usual)  # nohup and background jobs ignore some
    try:
        assert run_tool(job, "interrupted; nothing was written") == code and cleaned
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, came_with)
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"


def test_a_job_says_how_it_ended():
    assert run_tool(lambda: None) == 0 and run_tool(lambda: 1) == 1


def test_a_logged_name_stays_in_its_line(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    log_to_stderr()
    logging.info("reading %s", "a\nerror: \x1b[31m.mp4")
    assert capsys.readouterr().err == "reading a\\nerror: \\x1b[31m.mp4\n"


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_a_number_is_finite(capsys, value):
    parser = Parser("A tool.")
    parser.add_argument("--guidance", type=float, default=4.0)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--guidance", value])
    assert stopped.value.code == 2 and "--guidance" in capsys.readouterr().err
    assert parser.parse_args([]).guidance == 4.0


def test_numbers_sizes_and_seeds_are_read():
    assert counts("50,4, 1") == [50, 4, 1]
    assert sides("HxW")("480x832") == (480, 832)
    assert sides("CxTxHxW")("16x21x60x104") == (16, 21, 60, 104)
    assert seeds("0,1,2") == seeds("0-2") == [0, 1, 2] and seeds("7,3-4") == [7, 3, 4]


@pytest.mark.parametrize(
    "read, texts",
    [
        (counts, ["", "0", "1,", "x", "-1", "1.5", "9" * 5000, "²"]),
        (sides("HxW"), ["", "64", "64x", "64x64x64", "0x64", "-64x64", "64 x 64", "9" * 5000]),
        (seeds, ["", "-1", "2-1", "0,0", "0-2,1", "0-", "0-99999", "x", "9" * 5000]),
    ],
)
def test_what_is_no_number_size_or_seed_is_refused_in_a_short_line(read, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as refusal:
            read(text)
        assert len(str(refusal.value)) < 200


def test_an_earlier_name_tells_the_present_one(capsys):
    options = parser()
    options.renamed("--frame-size", "--size HxW")
    for argv in (["--frame-size", "64", "64"], ["--frame-size=64"], ["--frame-size"]):
        with pytest.raises(SystemExit) as stop:
            options.parse_args(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error == "error: --frame-size is called --size HxW now; see --help\n"
    assert "frame_size" not in vars(options.parse_args([]))
    assert "frame-size" not in options.format_help()


def test_an_option_is_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--stud", "a"])
    assert "unrecognized arguments: --stud" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, argv, told",
    [
        (None, ["/home/me/.venv/bin/streamvid", "bench", "--out", "a b"], "streamvid bench"),
        (None, ["tools/bench.py", "--out", "a b"], "python tools/bench.py"),
        ("streamvid.cli.bench", ["/x/bench.py", "--out", "a b"], "python -m streamvid.cli.bench"),
        (
            "streamvid.cli.__main__",
            ["/x", "bench", "--out", "a b"],
            "python -m streamvid.cli bench",
        ),
    ],
)
def test_a_report_tells_the_command_as_a_shell_takes_it(monkeypatch, module, argv, told):
    spec = SimpleNamespace(name=module) if module else None
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, "argv", argv)
    assert invocation() == f"{told} --out 'a b'"


def test_names_of_a_list_must_be_known():
    known = ["start", "dmd"]
    assert names_of("--only", None, known) == known
    assert names_of("--only", "dmd, start", known) == ["dmd", "start"]
    with pytest.raises(ValueError, match="^--redo sid: expected some of start, dmd$"):
        names_of("--redo", "dmd,sid", known)


def test_what_only_the_repository_has_is_asked_for_in_a_clone(monkeypatch, tmp_path):
    assert in_repository("configs/run/quickstart.yaml").is_file()
    monkeypatch.setattr("streamvid.command_line.__file__", str(tmp_path / "a" / "command_line.py"))
    with pytest.raises(ValueError, match="run this from a clone"):
        in_repository("configs/run/quickstart.yaml")
