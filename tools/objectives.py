"""Train every objective on the world from one start, and compare them.

    python tools/objectives.py --updates 60 --out benchmarks/objectives.json

The command `streamvid objectives`, run from a clone.
"""

import sys

from streamvid.cli.objectives import main

if __name__ == "__main__":
    sys.exit(main())
