"""Demonstrations; each is a module that `python -m` runs."""
