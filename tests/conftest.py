"""One thread for all tests and what they start: threads that wait for each other crawl on a machine
that does other work.
"""

import os

# before torch is imported, here and in other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
