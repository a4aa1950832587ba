"""Where the shipped networks are: folders of the installed package."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TINY_TEACHER = ASSETS / "teacher"
TINY_START = ASSETS / "start"
"""The causal start: the teacher's weights, adapted to chunks."""
TINY_STUDENT = ASSETS / "student"
