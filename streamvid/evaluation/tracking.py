"""Bodies of the verifiable world, read back from pixels: segment, link over time, fit templates.

A clip goes through four steps, none of which sees a caption:

1. ``find_pieces``: pixels that differ from the frame's floor colour, connected components, split by
  colour;
2. ``link_pieces``: one chain a body, by colour first and by distance second, so that a jump is
  still one body;
3. ``fit_template``: Gauss-Newton on the drawn shape against the observed coverage, for centre and
  radius;
4. ``parse``: the bodies with their shape, radius, track, and where another body excuses their
  absence.

Blur keeps a body's mass and its outline symmetric, so the fits stand lossy codecs and soft edges. A
pixel where another body is seen carries no weight: it may hide this one. That is all the occlusion
handling there is.

Notation: T frames, N pieces (one body in one frame), P patch side, S shapes; coverage is 0 on the
floor and 1 inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from streamvid.data.world import BACKGROUND, COLOURS, SHAPES, SIZE, signed_distance

FLOOR = np.asarray(BACKGROUND, dtype=np.float32)
NAMES = tuple(COLOURS)
# [6, 3], measured from the floor
PAINTS = np.asarray([COLOURS[name] for name in NAMES], dtype=np.float32) - FLOOR
PAINT_NORMS = np.linalg.norm(PAINTS, axis=1)
PAINT_RAYS = PAINTS / PAINT_NORMS[:, None]
FOREGROUND = 0.4  # coverage from which a pixel belongs to a body
MIN_PIXELS = 14  # the smallest whole body covers 72
MIN_CORE = 5
MAX_PIECES = 6  # a frame; the largest are kept
PATCH = 30
# width in pixels of the template's soft edge: wider than drawn, so that a fit feels a miss of a
# pixel
EDGE = 1.6
LINK_RADIUS = 10.0  # pixels: a body that changes colour is still itself within this distance
LONGEST_HIDING = 12  # frames from which a body that is out of sight is looked for
WELL_VISIBLE = 0.92  # share of its own area from which shape, size and colour of a body are read
FITTED = 0.5  # share from which its centre is


@dataclass(frozen=True)
class Pieces:
    """Every body of every frame: ``frame [N]``, ``centre [N, 2]``, ``paint [N, 3]`` minus floor,
    ``touching [N]``.
    """

    frame: np.ndarray
    centre: np.ndarray
    paint: np.ndarray
    touching: np.ndarray


@dataclass(frozen=True)
class TrackedBody:
    """One body over T frames; NaN where it was not measured.

    ``track [T, 2]`` centre (x, y); ``paints [T, 3]`` colour minus floor colour; ``radii [T]``;
    ``shape_errors [T, 3]`` misfit of each of ``SHAPES``; ``present [T]``: seen; ``hidden [T]``:
    rightly unseen, because another body is in front.
    """

    colour: str
    shape: str
    radius: float
    track: np.ndarray
    paints: np.ndarray
    radii: np.ndarray
    shape_errors: np.ndarray
    present: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class ParsedClip:
    """What a clip shows: bodies by first appearance, ``floors [T, 3]``, and for each pair that
    overlaps the share of the shared area in which the first is seen, ``overlaps[i, j] [T]``, NaN in
    frames without overlap.
    """

    bodies: tuple[TrackedBody, ...]
    floors: np.ndarray
    overlaps: dict[tuple[int, int], np.ndarray]


# ---- pieces --------------------------------------------------------------------------------------


def colour_angles(paint: np.ndarray) -> np.ndarray:
    """Angles in degrees ``[..., 6]`` between colours (minus floor) and those of the palette;
    brightness is ignored.
    """
    norm = np.linalg.norm(paint, axis=-1, keepdims=True)
    cosine = (paint @ PAINT_RAYS.T) / np.maximum(norm, 1e-6)
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def _interior(labels: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours have their own label; the border of the image counts as more of
    the same.
    """
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)), mode="edge")
    same = labels >= 0
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        same &= padded[:, rows : rows + SIZE, columns : columns + SIZE] == labels
    return same


def _label_pixels(contrast: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest palette colour of each foreground pixel ``[T, H, W]`` (-1 on the floor), and its
    coverage.
    """
    square = np.einsum("tchw,tchw->thw", contrast, contrast)
    where = np.nonzero(square > (FOREGROUND * PAINT_NORMS.min()) ** 2)
    along = contrast.transpose(0, 2, 3, 1)[where] @ PAINT_RAYS.T
    nearest = along.argmax(axis=1)
    coverage = along.max(axis=1) / PAINT_NORMS[nearest]
    labels = np.full(square.shape, -1, dtype=np.int8)
    labels[where] = np.where(coverage > FOREGROUND, nearest, -1)
    strength = np.zeros(square.shape, dtype=np.float32)
    strength[where] = coverage
    return labels, strength


def _eligible(component: np.ndarray, colour: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Which (component, colour) pairs are bodies ``[components, 6]``: thick enough not to be a
    mixed edge.
    """
    shape = (int(component.max(initial=0)) + 1, len(NAMES))
    key = component * len(NAMES) + colour
    counts = np.bincount(key, minlength=shape[0] * shape[1]).reshape(shape)
    cores = np.bincount(key[inner], minlength=shape[0] * shape[1]).reshape(shape)
    total = counts.sum(axis=1)
    eligible = (counts >= np.maximum(MIN_PIXELS, 0.1 * total[:, None])) & (cores >= MIN_CORE)
    # A body between two palette colours is speckled: its dominant label stands for all of it.
    orphan = ~eligible.any(axis=1) & (total >= 2 * MIN_PIXELS) & (counts.max(axis=1) >= 0.4 * total)
    eligible[orphan, counts[orphan].argmax(axis=1)] = True
    return eligible


def _keep_largest(frame: np.ndarray, mass: np.ndarray) -> np.ndarray:
    order = np.lexsort((-mass, frame))
    rank = np.arange(len(order)) - np.searchsorted(frame[order], frame[order])
    return np.sort(order[rank < MAX_PIECES])


def find_pieces(contrast: np.ndarray) -> Pieces:
    """Bodies of each frame from its ``contrast [T, 3, H, W]``, the difference to the floor."""
    labels, strength = _label_pixels(contrast)
    plane = np.zeros((3, 3, 3), dtype=bool)
    plane[1] = True
    components, _ = ndimage.label(labels >= 0, structure=plane)
    once = _interior(labels)
    twice = _interior(np.where(once, labels, -1))
    where = np.nonzero(labels >= 0)
    component, colour = components[where], labels[where].astype(int)
    eligible = _eligible(component, colour, once[where])
    index = np.full(eligible.shape, -1)
    index[eligible] = np.arange(eligible.sum())
    piece = index[component, colour]
    keep = piece >= 0
    piece, (frame, row, column) = piece[keep], (axis[keep] for axis in where)
    count = int(eligible.sum())
    if count == 0:
        return Pieces(
            np.zeros(0, dtype=int), np.zeros((0, 2)), np.zeros((0, 3)), np.zeros(0, dtype=bool)
        )
    total = lambda weight: np.bincount(piece, weights=weight, minlength=count)
    weight = strength[frame, row, column]
    mass = total(weight)
    centre = (
        np.stack([total(weight * (column + 0.5)), total(weight * (row + 0.5))], axis=1)
        / mass[:, None]
    )
    # Colour from the core, two pixels in where that leaves anything: a blurred edge is darker.
    deep, shallow = twice[frame, row, column].astype(float), once[frame, row, column].astype(float)
    inner = np.where(
        (total(deep) >= MIN_CORE)[piece], deep, np.where((total(shallow) > 0)[piece], shallow, 1.0)
    )
    paint = np.stack([total(inner * contrast[frame, c, row, column]) for c in range(3)], axis=1)
    paint /= total(inner)[:, None]
    frames_of = (total(frame) / total(None)).round().astype(int)
    touching = (eligible.sum(axis=1) > 1)[np.nonzero(eligible)[0]]
    kept = _keep_largest(frames_of, mass)
    return Pieces(frames_of[kept], centre[kept], paint[kept], touching[kept])


def link_pieces(pieces: Pieces) -> np.ndarray:
    """Body index of each piece ``[N]``: same colour at any distance, else the nearest within
    ``LINK_RADIUS``.
    """
    body = np.full(len(pieces.frame), -1)
    colour = colour_angles(pieces.paint).argmin(axis=1)
    last: list[int] = []  # latest piece of each body
    for frame in np.unique(pieces.frame):
        now = np.nonzero(pieces.frame == frame)[0]
        if last:
            distance = np.linalg.norm(
                pieces.centre[last][:, None] - pieces.centre[now][None], axis=-1
            )
            changed = colour[last][:, None] != colour[now][None]
            apart = changed & (distance > LINK_RADIUS)
            # One new body (1.5) is likelier than two that change colour (1 each); distance only
            # breaks ties.
            cost = distance / (4 * SIZE) + np.where(apart, 1.5, changed)
            for old, new in zip(*linear_sum_assignment(cost)):
                if not apart[old, new]:
                    body[now[new]] = old
                    last[old] = now[new]
        for new in now[body[now] < 0]:
            body[new] = len(last)
            last.append(new)
    return body


# ---- template fits -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patches:
    """Square cut-outs around pieces: pixel centres ``x, y [N, P]``, ``coverage`` and ``weight``
    ``[N, P, P]``.
    """

    x: np.ndarray
    y: np.ndarray
    coverage: np.ndarray
    weight: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Patches:
        return Patches(self.x[rows], self.y[rows], self.coverage[rows], self.weight[rows])


def _neighbour_paints(pieces: Pieces, body: np.ndarray) -> np.ndarray:
    """Colour of the nearest other body ``[N, 3]``, 0 without one in reach; one that is all but
    hidden in a frame counts where it was last or is next seen.
    """
    paints = np.zeros_like(pieces.paint, dtype=np.float32)
    closest = np.full(len(body), float(PATCH))
    for other in range(body.max() + 1):
        own = np.nonzero(body == other)[0]
        late = np.clip(np.searchsorted(pieces.frame[own], pieces.frame), 0, len(own) - 1)
        early = np.maximum(late - 1, 0)
        gaps = np.abs(pieces.frame[own[np.stack([early, late])]] - pieces.frame)
        seen = own[np.where(gaps[0] < gaps[1], early, late)]
        distance = np.linalg.norm(pieces.centre[seen] - pieces.centre, axis=1)
        nearer = (body != other) & (gaps.min(axis=0) <= LONGEST_HIDING) & (distance < closest)
        paints[nearer], closest[nearer] = pieces.paint[seen[nearer]], distance[nearer]
    return paints


def cut_patches(contrast: np.ndarray, pieces: Pieces, body: np.ndarray) -> Patches:
    """Coverage of each piece by least squares on its own colour and that of the nearest other
    body.
    """
    corner = np.round(pieces.centre - PATCH / 2).astype(int)
    column, row = (corner[:, axis, None] + np.arange(PATCH) for axis in (0, 1))
    inside = ((row >= 0) & (row < SIZE))[:, :, None] & ((column >= 0) & (column < SIZE))[:, None, :]
    rows, columns = np.clip(row, 0, SIZE - 1)[:, :, None], np.clip(column, 0, SIZE - 1)[:, None, :]
    # [N, P, P, 3]
    pixels = contrast.transpose(0, 2, 3, 1)[pieces.frame[:, None, None], rows, columns]
    own, other = pieces.paint.astype(np.float32), _neighbour_paints(pieces, body)
    a, b, c = (np.einsum("nc,nc->n", p, q) for p, q in ((own, own), (own, other), (other, other)))
    c = c + 1e-3  # no neighbour: its coverage is 0; the same colour twice stays solvable
    determinant = a * c - b * b
    to_own = (own * c[:, None] - other * b[:, None]) / determinant[:, None]
    to_other = (other * a[:, None] - own * b[:, None]) / determinant[:, None]
    coverage = np.einsum("nhwc,nc->nhw", pixels, to_own)
    hidden = np.clip(np.einsum("nhwc,nc->nhw", pixels, to_other), 0.0, 1.0)
    hidden[hidden < 0.1] = 0.0
    weight = inside * (1.0 - hidden)
    return Patches(column + 0.5, row + 0.5, coverage.astype(np.float32), weight.astype(np.float32))


def _outline(
    patches: Patches, shape: str, centre: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, ...]:
    dx = (patches.x - centre[:, :1]).astype(np.float32)[:, None, :]
    dy = (patches.y - centre[:, 1:]).astype(np.float32)[:, :, None]
    return dx, dy, signed_distance(shape, dx, dy, radius.astype(np.float32)[:, None, None])


def fit_template(
    patches: Patches,
    shape: str,
    centre: np.ndarray,
    radius: np.ndarray,
    *,
    steps: int,
    fit_radius: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Centre ``[N, 2]`` and radius ``[N]`` that bring the drawn shape closest to the coverage
    (Gauss-Newton).
    """
    for _ in range(steps):
        dx, dy, distance = _outline(patches, shape, centre, radius)
        edge = (np.abs(distance) < EDGE / 2) * patches.weight
        residual = (patches.coverage - np.clip(0.5 - distance / EDGE, 0.0, 1.0)) * edge
        slope_y, slope_x = np.gradient(distance, axis=(1, 2))
        # A distance scales with the figure: r d/dr = distance - p . grad.
        growth = (
            -(distance - dx * slope_x - dy * slope_y) / radius.astype(np.float32)[:, None, None]
        )
        slopes = [slope_x, slope_y, growth][: 3 if fit_radius else 2]
        # [N, 2 or 3, P P]
        jacobian = np.stack([s.reshape(len(s), -1) for s in slopes], axis=1) / EDGE
        normal = (jacobian * edge.reshape(len(edge), 1, -1)) @ jacobian.transpose(0, 2, 1)
        normal += 1e-2 * np.eye(len(slopes), dtype=np.float32)
        move = np.linalg.solve(normal, jacobian @ residual.reshape(len(residual), -1, 1))[..., 0]
        move = np.clip(move, -2.0, 2.0)
        centre = centre + move[:, :2]
        if fit_radius:
            radius = np.clip(radius + move[:, 2], 2.0, 20.0)
    return centre, radius


def _misfit(patches: Patches, shape: str, centre: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Squared error of the drawn shape over the area that it shows ``[N]``."""
    template = np.clip(0.5 - _outline(patches, shape, centre, radius)[2] / EDGE, 0.0, 1.0)
    error = patches.weight * (patches.coverage - template) ** 2
    return error.sum(axis=(1, 2)) / np.maximum((patches.weight * template).sum(axis=(1, 2)), 1.0)


AREAS = {"circle": np.pi, "square": 3.0976, "triangle": 1.9974}  # over radius squared


def fit_shapes(patches: Patches, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every shape fitted to every piece: centres ``[N, S, 2]``, radii ``[N, S]`` and misfits ``[N,
    S]``.
    """
    mass = np.maximum((patches.coverage * patches.weight).sum(axis=(1, 2)), 10.0)
    fits = []
    for shape in SHAPES:
        start = np.clip(np.sqrt(mass / AREAS[shape]), 2.0, 14.0)
        at, radius = fit_template(patches, shape, centre, start, steps=3, fit_radius=True)
        fits.append((at, radius, _misfit(patches, shape, at, radius)))
    return tuple(np.stack(part, axis=1) for part in zip(*fits))


# ---- bodies --------------------------------------------------------------------------------------


def _visible_share(patches: Patches, shape: str, centre: np.ndarray, radius: float) -> np.ndarray:
    """Share of the drawn shape that is seen in its place ``[N]``."""
    template = np.clip(
        0.5 - _outline(patches, shape, centre, np.full(len(centre), radius))[2], 0.0, 1.0
    )
    seen = (template * np.clip(patches.coverage, 0.0, 1.0) * (patches.weight > 0)).sum(axis=(1, 2))
    return seen / (AREAS[shape] * radius * radius)


def _measure(pieces: Pieces, patches: Patches, num_frames: int) -> TrackedBody:
    """One body from its pieces, at most one a frame."""
    mass = (np.clip(patches.coverage, 0.0, 1.0) * patches.weight).sum(axis=(1, 2))
    whole = ~pieces.touching | (mass >= WELL_VISIBLE * np.quantile(mass, 0.9))
    centres, radii, misfits = fit_shapes(patches, pieces.centre)
    index = int(np.median(misfits[whole], axis=0).argmin())
    shape, radius = SHAPES[index], float(np.median(radii[whole, index]))
    centre = centres[:, index].copy()
    partial = ~whole
    if partial.any():
        fixed = np.full(partial.sum(), radius)
        centre[partial] = fit_template(
            patches[partial], shape, pieces.centre[partial], fixed, steps=8, fit_radius=False
        )[0]
    share = _visible_share(patches, shape, centre, radius)
    spread = lambda values, keep: _over_time(values, keep, pieces.frame, num_frames)
    present = np.zeros(num_frames, dtype=bool)
    present[pieces.frame] = True
    reference = np.median(pieces.paint[whole], axis=0)
    return TrackedBody(
        NAMES[int(colour_angles(reference).argmin())],
        shape,
        radius,
        spread(centre, whole | (share >= FITTED)),
        spread(pieces.paint, whole),
        spread(radii[:, index], whole),
        spread(misfits, whole),
        present,
        np.zeros(num_frames, dtype=bool),
    )


def _over_time(
    values: np.ndarray, keep: np.ndarray, frame: np.ndarray, num_frames: int
) -> np.ndarray:
    out = np.full((num_frames, *values.shape[1:]), np.nan)
    out[frame[keep]] = values[keep]
    return out


def _continue_track(track: np.ndarray, known: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Centres ``[frames, 2]`` on the line through the first and last of the ``known`` frames."""
    span = max(1, known[-1] - known[0])
    velocity = (track[known[-1]] - track[known[0]]) / span
    return track[known[-1]] + velocity * (np.asarray(frame) - known[-1])[..., None]


def fill_track(body: TrackedBody) -> np.ndarray:
    """The track ``[T, 2]`` with gaps bridged linearly and ends continued at the nearest known
    velocity.
    """
    known = np.nonzero(~np.isnan(body.track[:, 0]))[0]
    time = np.arange(len(body.track))
    if len(known) == 0:
        return np.full((len(time), 2), np.inf)
    track = np.stack([np.interp(time, known, body.track[known, axis]) for axis in (0, 1)], axis=1)
    early, late = time < known[0], time > known[-1]
    track[early] = _continue_track(body.track, known[:5], time[early])
    track[late] = _continue_track(body.track, known[-5:], time[late])
    return track


def _guesses(body: TrackedBody, filled: np.ndarray, frame: int) -> list[np.ndarray]:
    """Where an unseen body may be: between its known places, or on from the ones before, or back
    from those after.
    """
    known = np.nonzero(~np.isnan(body.track[:, 0]))[0]
    sides = (known[known < frame][-5:], known[known > frame][:5])
    return [
        filled[frame],
        *(_continue_track(body.track, side, frame) for side in sides if len(side)),
    ]


GRID_Y, GRID_X = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")


def _area(body: TrackedBody, at: np.ndarray, shrink: float = 0.0) -> np.ndarray:
    return signed_distance(body.shape, GRID_X - at[0], GRID_Y - at[1], body.radius) < -shrink


def _too_little_to_see(area: np.ndarray) -> bool:
    """Whether ``find_pieces`` may miss what is left of a body, with a margin for its place being a
    guess.
    """
    inner = _interior(area[None].astype(np.int8) - 1)
    return area.sum() < 3 * MIN_PIXELS or inner.sum() < 3 * MIN_CORE


def _compare(
    contrast: np.ndarray, bodies: list[TrackedBody], i: int, j: int
) -> tuple[np.ndarray, ...]:
    """For two bodies: the share of their overlap in which the first is seen ``[T]``, and where each
    one's absence is excused because too little of it would show beside the other ``[T]``.
    """
    first, second = bodies[i], bodies[j]
    tracks = fill_track(first), fill_track(second)
    num_frames = len(contrast)
    share = np.full(num_frames, np.nan)
    excused = np.zeros((2, num_frames), dtype=bool)
    reach = 1.3 * (first.radius + second.radius)
    with np.errstate(invalid="ignore"):
        near = np.linalg.norm(tracks[0] - tracks[1], axis=1) < reach
    paints = [np.nanmedian(body.paints, axis=0) for body in (first, second)]
    for frame in np.nonzero(near & (first.present | second.present))[0]:
        for which, (body, other) in enumerate(((first, second), (second, first))):
            if other.present[frame] and not body.present[frame]:
                cover = ~_area(other, tracks[1 - which][frame])
                places = _guesses(body, tracks[which], frame)
                excused[which, frame] = any(
                    _too_little_to_see(_area(body, place) & cover) for place in places
                )
        core = _area(first, tracks[0][frame], 1.5) & _area(second, tracks[1][frame], 1.5)
        if core.sum() >= 8:
            pixels = contrast[frame][:, core].T
            along = [pixels @ (paint / np.linalg.norm(paint)) for paint in paints]
            share[frame] = float(np.mean(along[0] > along[1]))
    return share, excused[0], excused[1]


def parse(frames: Tensor) -> ParsedClip:
    """Bodies of a clip ``frames [T, 3, 64, 64]`` in [0, 1], measured from its pixels alone.

    Raises:
        ValueError: if the frames have another shape.
    """
    if frames.ndim != 4 or tuple(frames.shape[1:]) != (3, SIZE, SIZE) or len(frames) == 0:
        raise ValueError(
            f"frames have shape {tuple(frames.shape)}; the world score reads [T, 3, {SIZE}, {SIZE}]"
        )
    pixels = np.nan_to_num(frames.detach().float().cpu().numpy(), nan=0.0).clip(0.0, 1.0)
    floors = np.median(pixels[:, :, ::2, ::2].reshape(len(pixels), 3, -1), axis=-1)
    contrast = pixels - floors[:, :, None, None]
    pieces = find_pieces(contrast)
    if len(pieces.frame) == 0:
        return ParsedClip((), floors, {})
    chain = link_pieces(pieces)
    patches = cut_patches(contrast, pieces, chain)
    bodies = []
    for index in range(chain.max() + 1):
        own = np.nonzero(chain == index)[0]
        part = Pieces(
            pieces.frame[own], pieces.centre[own], pieces.paint[own], pieces.touching[own]
        )
        bodies.append(_measure(part, patches[own], len(pixels)))
    overlaps = {}
    for i in range(len(bodies)):
        for j in range(i + 1, len(bodies)):
            share, first_hidden, second_hidden = _compare(contrast, bodies, i, j)
            bodies[i].hidden[first_hidden] = True
            bodies[j].hidden[second_hidden] = True
            if not np.isnan(share).all():
                overlaps[i, j] = share
    return ParsedClip(tuple(bodies), floors, overlaps)
