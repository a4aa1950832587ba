"""Serve streams over WebSocket, and clips over HTTP.

    streamvid serve --student runs/tiny_dmd/student --port 8000

See docs/serving.md for the protocol.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    from streamvid.serving import command

    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
