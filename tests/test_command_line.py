"""What all tools share: options that are not empty, one line for a mistake, and ends that clean
up.
"""

import logging
import os
import signal

import pytest
import torch

from streamvid.command_line import Parser, log_to_stderr, run_tool


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

    before = signal.getsignal(number)
    assert run_tool(job, "interrupted; nothing was written") == code and cleaned
    assert (
        capsys.readouterr().err == "error: interrupted; nothing was written\n"
        and signal.getsignal(number) is before
    )


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
