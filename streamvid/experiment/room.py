"""What a run writes to its disk, before it starts: checkpoints and the export."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from streamvid.experiment.config import RunConfig, locate_shipped
from streamvid.experiment.estimate import roles_of
from streamvid.experiment.on_meta import UnknownSizes, build_on_meta
from streamvid.metering import GIB
from streamvid.students.folder import COMPONENTS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """What a run writes; bytes."""

    checkpoint: int
    num_checkpoints: int
    """Checkpoints on the disk at once: those that are kept and the one being written."""
    export: int

    @property
    def bytes(self) -> int:
        return self.num_checkpoints * self.checkpoint + self.export

    def line(self) -> str:
        """For people."""
        return (
            f"on disk: {self.bytes / GIB:.3f} GiB, for {self.num_checkpoints} checkpoints of"
            f" {self.checkpoint / GIB:.3f} at once and an export of {self.export / GIB:.3f}"
        )


def room_of(config: RunConfig) -> Room:
    """What a run writes at most, by its networks: all that is trained, with what optimisers
    remember and averages.

    Raises:
        UnknownSizes: if a network's sizes can't be known.
    """
    config = locate_shipped(config)
    method = build_on_meta(config)
    beside = {role.name: role.optimizer + role.average for role in roles_of(config, method)}
    saved = sum(
        t.nbytes for network in method.networks().values() for t in network.state_dict().values()
    )
    # adapters are merged into their base
    student = nn.Module.named_parameters(method.networks()["student"])
    files = [
        file
        for part in COMPONENTS
        for file in (Path(config.components) / part).rglob("*")
        if file.is_file()
    ]
    return Room(
        checkpoint=saved + sum(beside[name] for name in method.networks()),
        num_checkpoints=min(
            config.train.keep_checkpoints + 1,
            math.ceil(config.train.max_steps / config.train.save_every),
        ),
        export=sum(p.nbytes for _, p in student) + sum(file.stat().st_size for file in files),
    )


def ensure_room(config: RunConfig) -> None:
    """Refuse a run whose next checkpoint finds no room on its disk, and warn of one that will fill
    it.

    A disk that is too small for all that is kept may be cleared meanwhile, and a run that fills it
    loses no more than the steps since its last checkpoint; one that can't take a single checkpoint
    loses everything.

    Raises:
        ValueError: one line, with what is needed and what is there.
    """
    try:
        room = room_of(config)
    except UnknownSizes:
        return
    run_dir = (Path(config.train.output_dir) / config.train.name).absolute()
    free = shutil.disk_usage(
        next(place for place in (run_dir, *run_dir.parents) if place.is_dir())
    ).free
    if free < room.checkpoint:
        raise ValueError(
            f"a checkpoint of this run takes {room.checkpoint / GIB:.2f} GiB, free on the disk of"
            f" {run_dir} are {free / GIB:.2f}; make room, or set train.output_dir"
        )
    # of this run, before it is resumed
    there = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
    if free + there < room.bytes:
        log.warning(
            "this run will write %.2f GiB (%d checkpoints and the export), and free on the disk of"
            " %s are %.2f; make room, or set train.keep_checkpoints=1",
            room.bytes / GIB,
            room.num_checkpoints,
            run_dir,
            free / GIB,
        )
