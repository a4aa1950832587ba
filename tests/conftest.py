"""One thread for all tests and what they start: threads that wait for each other crawl on a machine that does other work."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in other processes
