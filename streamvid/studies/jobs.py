"""Finished jobs: each is a JSON file in a folder, written as soon as the job ends, so that a study
can stop and go on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamvid.files import atomic_file


def result_file(folder: Path, *key: object) -> Path:
    """Where the result of a job is kept; ``key`` tells it from the others of the folder."""
    return folder / f"{'-'.join(map(str, key))}.json"


def read_result(file: Path) -> Any:
    """The result of a job, or a report of results.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it and run again") from error


def write_result(file: Path, result: Any) -> None:
    """Keep the result of a job; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(result) + "\n")
