"""Make a student folder of a published checkpoint.

    python tools/convert.py --from self-forcing self_forcing_dmd.pt --to students/self_forcing

The command `streamvid convert`, run from a clone.
"""

import sys

from streamvid.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
