"""Distil, stream and compare in a few minutes.

    python tools/quickstart.py --minutes 2 --num-prompts 24

The command `streamvid quickstart`, run from a clone.
"""

import sys

from streamvid.cli.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
