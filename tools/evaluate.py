"""Score students, and a teacher, on held-out prompts.

    python tools/evaluate.py --student runs/tiny_dmd/student --out report.json

The command `streamvid evaluate`, run from a clone.
"""

import sys

from streamvid.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
