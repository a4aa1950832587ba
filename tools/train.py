"""Train a network by an objective.

    python tools/train.py --config configs/run/tiny_dmd.yaml
    accelerate launch --cpu --num_processes 2 tools/train.py --config configs/run/tiny_dmd.yaml

The command `streamvid train`, run from a clone.
"""

import sys

from streamvid.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
