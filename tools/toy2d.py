"""Compare all objectives in the plane.

    python tools/toy2d.py --only dmd,sid --quick

The command `streamvid toy2d`, run from a clone.
"""

import sys

from streamvid.cli.toy2d import main

if __name__ == "__main__":
    sys.exit(main())
