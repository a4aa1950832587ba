"""How truly a clip of the verifiable world is drawn: each frame against what its bodies would make.

``tracking.parse`` reads the bodies of a clip; ``redraw`` draws them again with the renderer's
edges, at the places and in the colours that were read. What differs is what the eye sees as bent
outlines, halos and trails. Nothing here sees a caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from streamvid.data.world import SIZE, signed_distance
from streamvid.evaluation.tracking import GRID_X, GRID_Y, ParsedClip, TrackedBody

NEAR = 3.0
"""Pixels around an outline that belong to the object; beyond is background."""


@dataclass(frozen=True)
class Drawing:
    """What ``T`` frames were redrawn as.

    ``frames [T, 3, 64, 64]``; ``distance [T, 64, 64]`` to the nearest outline in pixels, negative
    inside, infinite without a body; ``length [T]``, the outlines' pixels; ``known [T]``: frames in
    which every body that is there was measured.
    """

    frames: np.ndarray
    distance: np.ndarray
    length: np.ndarray
    known: np.ndarray


def redraw(parsed: ParsedClip) -> Drawing:
    """The clip as its bodies say; the body that is seen in an overlap is drawn last."""
    num_frames = len(parsed.floors)
    frames = np.repeat(parsed.floors[:, :, None, None], SIZE, axis=2).repeat(SIZE, axis=3)
    distance = np.full((num_frames, SIZE, SIZE), np.inf)
    length = np.zeros(num_frames)
    known = np.ones(num_frames, dtype=bool)
    for index in _back_to_front(parsed):
        body = parsed.bodies[index]
        seen = ~np.isnan(body.track[:, 0])
        known &= seen | ~body.present
        at = body.track[seen]
        own = signed_distance(
            body.shape,
            GRID_X - at[:, 0, None, None],
            GRID_Y - at[:, 1, None, None],
            body.radius,
        )
        cover = np.clip(0.5 - own, 0.0, 1.0)[:, None]
        paint = parsed.floors[seen] + _paint_of(body)
        frames[seen] += cover * (paint[:, :, None, None] - frames[seen])
        distance[seen] = np.minimum(distance[seen], own)
        length[seen] += (np.abs(own) <= 0.5).sum(axis=(1, 2))
    return Drawing(frames, distance, length, known & (length > 0))


def _paint_of(body: TrackedBody) -> np.ndarray:
    """Its colour minus the floor's in the frames of its track ``[seen, 3]``: its own where it is
    seen whole, else the clip's median.
    """
    paints = body.paints[~np.isnan(body.track[:, 0])]
    whole = np.nanmedian(body.paints, axis=0)
    return np.where(np.isnan(paints), whole, paints)


def _back_to_front(parsed: ParsedClip) -> list[int]:
    """Indices of the bodies; of two that overlap, the one that is mostly hidden comes first."""
    depth = np.zeros(len(parsed.bodies))
    for (first, second), share in parsed.overlaps.items():
        front = first if np.nanmean(share) > 0.5 else second
        depth[front] += 1
    return [int(index) for index in np.argsort(depth, kind="stable")]


@dataclass(frozen=True)
class Fidelity:
    """Per frame ``[T]``, NaN where a body was not measured.

    ``boundary``: area that is inside where it should be outside, or outside where it should be
    inside, over the outline's length, in pixels; ``background``: root mean square of the
    colour's error beyond ``NEAR`` pixels from the bodies.
    """

    boundary: np.ndarray
    background: np.ndarray

    def between(self, start: int, stop: int) -> Fidelity:
        """Of the frames from ``start`` to before ``stop``."""
        return Fidelity(*(values[start:stop] for values in vars(self).values()))


def measure_fidelity(frames: Tensor, parsed: ParsedClip) -> Fidelity:
    """How far ``frames [T, 3, 64, 64]`` in [0, 1] are from what they show."""
    drawing = redraw(parsed)
    error = frames.detach().float().cpu().numpy() - drawing.frames
    edge = np.abs(drawing.distance) <= NEAR
    contrast = np.abs(drawing.frames - parsed.floors[:, :, None, None]).max(axis=(2, 3))
    scale = np.maximum(np.linalg.norm(contrast, axis=1), 1e-6)
    missed = (np.linalg.norm(error, axis=1) * edge).sum(axis=(1, 2)) / scale
    values = {
        "boundary": missed / np.maximum(drawing.length, 1),
        "background": _rms(error, drawing.distance > NEAR),
    }
    return Fidelity(**{name: np.where(drawing.known, v, np.nan) for name, v in values.items()})


def _rms(error: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Of ``error [T, 3, H, W]`` over the places of a mask ``[T, H, W]``: ``[T]``."""
    square = (error**2).mean(axis=1)
    return np.sqrt((square * where).sum(axis=(1, 2)) / np.maximum(where.sum(axis=(1, 2)), 1))
