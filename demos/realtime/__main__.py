"""Start the server on the shipped student and open its page in a browser.

    python -m demos.realtime
    python -m demos.realtime --student runs/tiny_dmd/student --device cuda

The options are those of ``streamvid-serve``.
"""

import sys

from streamvid.serving.command import demo

if __name__ == "__main__":
    sys.exit(demo())
