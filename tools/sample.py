"""Make clips with a student.

    python tools/sample.py --prompt "a small red circle moves up quickly" --out clip.mp4

The command `streamvid sample`, run from a clone.
"""

import sys

from streamvid.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
