"""streamvid: distil causal video students from diffusion teachers, and stream them.

    streamvid train --config configs/run/tiny_dmd.yaml
    streamvid sample --prompt "a small red circle moves up quickly" --out clip.mp4
    streamvid COMMAND --help

The commands:
"""

from __future__ import annotations

import difflib
import importlib
import sys

from streamvid import __version__
from streamvid.command_line import say, tell
from streamvid.threads import set_thread_defaults

COMMANDS = {
    "quickstart": "quickstart",
    "train": "train",
    "sample": "sample",
    "evaluate": "evaluate",
    "study": "study",
    "bench": "bench",
    "convert": "convert",
    "trajectories": "trajectories",
    "toy2d": "toy2d",
    "objectives": "objectives",
    "serve": "serve",
    "demo": "demo",
    "load": "load",
    "gpu-check": "gpu_check",
}
"""Names of commands, and their modules in `streamvid.cli`."""


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names; returns the exit code."""
    set_thread_defaults()
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        say_help()
        return 0
    if name == "--version":
        say(f"streamvid {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        known = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        tell(f"error: there is no command {name[:60]}; {known}")
        return 2
    return importlib.import_module(f"streamvid.cli.{COMMANDS[name]}").main(rest)


def say_help() -> None:
    """Print how to call it, and each command with the first sentence of its docstring."""
    print(f"{__doc__.strip()}\n")
    for name, module in COMMANDS.items():
        doc = importlib.import_module(f"streamvid.cli.{module}").__doc__ or "."
        print(f"  {name:14}{doc.splitlines()[0]}")


if __name__ == "__main__":
    sys.exit(main())
