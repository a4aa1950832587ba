"""The process of one part: imports while it waits, measures when it is told to.

    python -m streamvid.gpu_check.child MODULE:FUNCTION FILE.json [--tiny]

It begins when a line comes on its standard input, and ends without work when that closes before.
"""

from __future__ import annotations

import gc
import importlib
import sys

from streamvid.gpu_check.measure import Report


def main(target: str, file: str, *flags: str) -> int:
    module, _, function = target.partition(":")
    work = getattr(importlib.import_module(module), function)
    if not sys.stdin.readline():
        return 0
    gc.freeze()  # so that collecting between measurements is quick
    report = Report(file, tiny="--tiny" in flags)
    work(report)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
