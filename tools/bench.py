"""Measure what streaming and the loss core cost on this machine.

    python tools/bench.py --suite stream --out stream.json

The command `streamvid bench`, run from a clone.
"""

import sys

from streamvid.cli.bench import main

if __name__ == "__main__":
    sys.exit(main())
