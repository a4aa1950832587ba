"""Open the page on which a stream is watched and steered.

    streamvid demo

See docs/serving.md.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    from streamvid.serving import command

    return command.demo(argv)


if __name__ == "__main__":
    sys.exit(main())
