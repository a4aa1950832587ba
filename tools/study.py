"""Train and compare many students, unattended.

    python tools/study.py --suite methods --quick

The command `streamvid study`, run from a clone.
"""

import sys

from streamvid.cli.study import main

if __name__ == "__main__":
    sys.exit(main())
