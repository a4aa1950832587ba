"""`streamvid` itself: what it lists, what it starts, and what it says of a wrong word."""

import subprocess
import sys

import pytest

from streamvid import __version__
from streamvid.cli.__main__ import COMMANDS, main


def test_help_lists_every_command_with_its_first_sentence(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        (line,) = [line for line in listed if line.startswith(f"  {name} ")]
        assert line.split(maxsplit=1)[1].endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith(f"usage: streamvid {name} ")
    assert f"streamvid {name}" in shown.split("\n\n", 1)[1], "an example"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "there is no command trian; did you mean train?"),
        (["gpu_check"], "did you mean gpu-check?"),
        (["\x1b[31m"], "there is no command \\x1b[31m; expected one of quickstart, train,"),
        ([""], "there is no command ; expected one of"),
    ],
)
def test_a_wrong_command_is_one_line(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"streamvid {__version__}\n"


def test_without_a_word_it_helps(capsys):
    assert main([]) == 0 and "streamvid COMMAND --help" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["train", "make_trajectories", "gpu_check"])
def test_the_files_of_tools_are_the_same_commands(tool):
    command = [sys.executable, f"tools/{tool}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: streamvid ")


def test_a_command_runs_as_a_module_too():
    command = [sys.executable, "-m", "streamvid.cli", "toy2d", "--nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unrecognized arguments")
