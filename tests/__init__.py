"""Tests of streamvid. What several of them share is in `fakes.py`, imported as `tests.fakes`."""
