"""Measure and check everything that we want to know of a GPU.

    python tools/gpu_check.py --out runs/gpu.json

The command `streamvid gpu-check`, run from a clone.
"""

import sys

from streamvid.cli.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
