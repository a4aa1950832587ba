"""Solve a teacher's probability flow for many prompts.

    python tools/make_trajectories.py --num-clips 500 --student-steps 4 --out data/trajectories

The command `streamvid trajectories`, run from a clone.
"""

import sys

from streamvid.cli.trajectories import main

if __name__ == "__main__":
    sys.exit(main())
