"""The measuring instrument: how well a clip of the verifiable world shows what its prompt says.

``score(frames, prompt)`` reads the prompt with ``read_caption``, the pixels with
``tracking.parse``, and compares. Every attribute is 1 within a tolerance that codecs need and falls
linearly to 0 where the next word would be right:

===========  =======================================================================================
colour       hue of each body against its word
shape        misfit of the stated shape against that of the best other one
size         radius against its word (only where the prompt says one)
direction    initial heading; in later windows, after bounces, the axis of motion
speed        speed of free flight against its word (families ``move`` and ``cross``)
number       how many bodies there are most of the time
order        who is in front where two bodies overlap (``cross``; None in a window without overlap)
physics      residual of the tracks against the law of motion with walls and gravity; stalls
permanence   share of frames in which every body is there, alone, and looks as it did
===========  =======================================================================================

Their mean is ``overall``: does the clip show what was asked for? How truly it is drawn is told
apart, because a bent square is a square; the mean of these is ``fidelity``:

===========  =======================================================================================
outline      area that is on the wrong side of the outlines, over their length
background   error beyond the bodies: trails, halos, noise
tint         distance of each body's colour from the palette's nearest
rhythm       unevenness of the motion: how its error changes from frame to frame
===========  =======================================================================================

True clips after a codec have 1 in all of them.

An attribute that the prompt leaves open, or that too few frames show, is None. A clip is scored in
windows, each with its own fit of the law, so that a long stream is not judged by the phase of its
hundredth bounce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares
from torch import Tensor

from streamvid.data.world import (
    COLOURS,
    DIRECTIONS,
    DRIFT,
    ELASTICITY,
    RADII,
    SHAPES,
    SIZE,
    SPEEDS,
    Caption,
    CaptionedBody,
    fall_heights,
    fold,
    read_caption,
)
from streamvid.evaluation.outline import Fidelity, measure_fidelity
from streamvid.evaluation.tracking import (
    FLOOR,
    PAINT_NORMS,
    PAINTS,
    ParsedClip,
    TrackedBody,
    colour_angles,
    parse,
)

__all__ = ["ATTRIBUTES", "FIDELITY", "WorldScore", "mean_scores", "parse", "score", "score_parsed"]

WINDOW = 32  # frames of a window where the caller names none
# frame pairs that show the initial direction; every scene flies freely for as long
INITIAL_STEPS = 8
FIRST_LOOK = 16  # measured frames that fix what a body looks like
PRESENT = 0.5  # share of a window for which a body must be there to belong to its scene
FEWEST_FRAMES = 4  # measured frames that a law can be fitted to
# what tells whom the caption means
IDENTITY = {"colour": 1.0, "shape": 1.0, "size": 1.0, "direction": 0.5}
CREEP = 0.3  # pixels per frame, half of slow: below it a body that should fly has stopped
STALL_WEIGHT = 4.0  # one stalled frame in 32 costs an eighth of the physics score

# (value that still scores 1, value that scores 0)
COLOUR_BAND = (0.35, 0.60)  # own angle / (own + nearest other angle)
SHAPE_BAND = (0.42, 0.58)  # own misfit / (own + best other misfit)
FORM_BAND = (0.15, 0.50)  # misfit of the best shape; a mush of 0.5 is no body at all
SIZE_BAND = (0.10, 0.36)  # |log ratio|; small and large are 0.41 apart
SPEED_BAND = (0.115, 0.59)  # |log ratio|; the next word is 0.6 away
ANGLE_BAND = (12.0, 45.0)  # degrees; the next word is 45 away
# share of the nominal drift that is missing, or that is there where none should be
DRIFT_BAND = (0.2, 0.8)
RESIDUAL_BAND = (0.5, 4.0)  # pixels, root mean square
HUE_BAND = (8.0, 30.0)  # degrees from what the body looked like
BRIGHTNESS_BAND = (0.06, 0.25)  # |log ratio| to what it was
GROWTH_BAND = (0.08, 0.35)  # |log ratio| of the radius
FLOOR_BAND = (0.03, 0.15)  # distance of the floor colour to its own
OUTLINE_BAND = (0.36, 0.66)  # pixels; clips after the shipped codec have .21 to .36
BACKGROUND_BAND = (0.003, 0.012)  # root mean square; after the codec .0017 to .0029
TINT_BAND = (0.02, 0.10)  # share of the colour's distance from the floor; after the codec to .018
RHYTHM_BAND = (0.28, 1.0)  # pixels per frame, root mean square; after the codec to .28


@dataclass(frozen=True)
class WorldScore:
    """Scores in [0, 1], None where not applicable; ``windows`` holds one score each when a window
    was asked for.
    """

    colour: float | None = None
    shape: float | None = None
    size: float | None = None
    direction: float | None = None
    speed: float | None = None
    number: float | None = None
    order: float | None = None
    physics: float | None = None
    permanence: float | None = None
    outline: float | None = None
    background: float | None = None
    tint: float | None = None
    rhythm: float | None = None
    windows: tuple[WorldScore, ...] = ()

    def attributes(self) -> dict[str, float]:
        """The attributes that apply, by name."""
        return {name: getattr(self, name) for name in ATTRIBUTES if getattr(self, name) is not None}

    @property
    def overall(self) -> float:
        """Mean of the attributes that apply."""
        return float(np.mean(list(self.attributes().values())))

    @property
    def fidelity(self) -> float | None:
        """Mean of how truly it is drawn; None where only the parsed clip was scored."""
        return _mean(getattr(self, name) for name in FIDELITY)


FIDELITY = ("outline", "background", "tint", "rhythm")
"""How truly a clip is drawn."""
ATTRIBUTES = tuple(
    name for name in WorldScore.__dataclass_fields__ if name not in (*FIDELITY, "windows")
)
"""What a clip shows."""


def _ramp(value: ArrayLike, band: tuple[float, float]) -> np.ndarray:
    """1 up to ``band[0]``, 0 from ``band[1]``, linear between; NaN stays NaN."""
    return np.clip((band[1] - np.asarray(value)) / (band[1] - band[0]), 0.0, 1.0)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else None


def _ramp_mean(values: np.ndarray, band: tuple[float, float]) -> float | None:
    """Of the mean over the frames that were measured."""
    mean = _mean(values)
    return None if mean is None else float(_ramp(mean, band))


# ---- looks ---------------------------------------------------------------------------------------


def _mush(body: TrackedBody) -> float:
    """Misfit of the shape that fits best; NaN where no frame shows the body whole."""
    misfits = body.shape_errors.min(axis=1)
    known = ~np.isnan(misfits)
    return float(np.median(misfits[known])) if known.any() else float("nan")


def _against_best_other(errors: np.ndarray, index: int, band: tuple[float, float]) -> float | None:
    """How clearly option ``index`` of ``errors [T, options]`` beats the best other one, averaged
    over time.
    """
    own, other = errors[:, index], np.delete(errors, index, axis=1).min(axis=1)
    return _mean(_ramp(own / np.maximum(own + other, 1e-9), band))


def _colour_score(body: TrackedBody, word: str | None) -> float | None:
    if word is None:
        return None
    return _against_best_other(colour_angles(body.paints), list(COLOURS).index(word), COLOUR_BAND)


def _shape_score(body: TrackedBody, word: str | None) -> float | None:
    if word is None or np.isnan(_mush(body)):
        return None
    score = _against_best_other(body.shape_errors, SHAPES.index(word), SHAPE_BAND)
    return None if score is None else score * float(_ramp(_mush(body), FORM_BAND))


def _size_score(body: TrackedBody, word: str | None) -> float | None:
    return (
        None if word is None else _mean(_ramp(np.abs(np.log(body.radii / RADII[word])), SIZE_BAND))
    )


# ---- motion --------------------------------------------------------------------------------------


def _steps(track: np.ndarray, lag: int = 1) -> np.ndarray:
    """Displacements a frame ``[*, 2]`` between measured frames ``lag`` apart."""
    steps = (track[lag:] - track[:-lag]) / lag
    return steps[~np.isnan(steps[:, 0])]


def _initial_velocity(body: TrackedBody) -> np.ndarray | None:
    """Velocity before the first wall, from the first few steps."""
    steps = _steps(body.track)
    if len(steps) == 0:
        return None
    centres = body.track[~np.isnan(body.track[:, 0])]
    velocity = np.zeros(2)
    for axis in (0, 1):
        to_wall = np.minimum(centres[:, axis], SIZE - centres[:, axis]) - body.radius
        touch = np.nonzero(to_wall[2:] < 0.3 + 0.5 * np.median(np.abs(steps[:, axis])))[0]
        free = 2 + touch[0] if len(touch) else INITIAL_STEPS
        velocity[axis] = np.median(steps[: min(INITIAL_STEPS, free), axis])
    return velocity


def _pace(body: TrackedBody) -> np.ndarray | None:
    """Typical speed along each axis, from displacements over two frames; bounces are too few to
    matter.
    """
    steps = _steps(body.track, 2)
    steps = steps if len(steps) else _steps(body.track)
    return np.median(np.abs(steps), axis=0) if len(steps) else None


def _heading_score(velocity: np.ndarray, stated: np.ndarray) -> float:
    speed = float(np.hypot(*velocity))
    cosine = velocity @ stated / max(speed * float(np.hypot(*stated)), 1e-9)
    return float(_ramp(np.degrees(np.arccos(np.clip(cosine, -1, 1))), ANGLE_BAND)) * min(
        1.0, speed / 0.2
    )


def _drift_score(velocity: float, stated: float) -> float:
    wanting = abs(velocity) if stated == 0 else DRIFT - velocity * np.sign(stated)
    return float(_ramp(wanting / DRIFT, DRIFT_BAND))


def _direction_score(
    body: TrackedBody, word: str | None, family: str, initial: bool
) -> float | None:
    """The heading in the first window; the axis of motion, blind to signs, in later ones."""
    velocity = _initial_velocity(body) if initial else _pace(body)
    if word is None or velocity is None:
        return None
    stated = np.asarray(DIRECTIONS[word]) if initial else np.abs(DIRECTIONS[word])
    if family == "fall":
        return _drift_score(velocity[0], stated[0])
    return _heading_score(velocity, stated)


def _speed_score(body: TrackedBody, word: str | None) -> float | None:
    if word is None or len(_steps(body.track)) == 0:
        return None
    lag = 2 if len(_steps(body.track, 2)) else 1
    speed = float(np.median(np.linalg.norm(_steps(body.track, lag), axis=1)))
    return float(_ramp(abs(np.log(max(speed, 1e-3) / SPEEDS[word])), SPEED_BAND))


# ---- laws ----------------------------------------------------------------------------------------


def _fit(
    law: Callable[..., np.ndarray], starts: list[tuple[float, float]], measured: np.ndarray
) -> np.ndarray:
    """Values of the two-parameter ``law`` closest to what was measured: best start, then least
    squares.
    """
    known = ~np.isnan(measured)
    miss = lambda parameters: (law(*parameters) - measured)[known]
    start = min(starts, key=lambda parameters: float(np.mean(miss(parameters) ** 2)))
    return law(*least_squares(miss, start, method="lm", max_nfev=40, diff_step=1e-5).x)


def _fit_free(measured: np.ndarray, radius: float) -> np.ndarray:
    """One axis of free flight between two walls."""
    time, low, high = np.arange(len(measured)), radius, SIZE - radius
    known = np.nonzero(~np.isnan(measured))[0]
    pace = np.abs(np.diff(measured[known]) / np.diff(known))
    speeds = {float(np.median(pace)), float(np.mean(pace))}
    anchors = known[np.linspace(0, len(known) - 1, 4).astype(int)]
    law = lambda position, velocity: fold(position + velocity * time, low, high)
    starts = [
        (measured[anchor] - velocity * anchor, velocity)
        for anchor in anchors
        for speed in speeds
        for velocity in (speed, -speed)
    ]
    return _fit(law, starts, measured)


def _fit_fall(measured: np.ndarray, radius: float, elasticity: float) -> np.ndarray:
    """Heights under gravity with bounces on the floor; the state at the first frame is free."""
    num_frames, floor = len(measured), SIZE - radius
    known = np.nonzero(~np.isnan(measured))[0]
    law = lambda height, velocity: fall_heights(
        min(height, floor), velocity, floor, elasticity, num_frames
    )
    first, second = known[0], known[1]
    slope = (measured[second] - measured[first]) / (second - first)
    miss = lambda heights: float(np.sqrt(np.nanmean((heights - measured) ** 2)))
    fitted = _fit(
        law, [(measured[first], slope + change) for change in (-0.3, -0.15, 0.0)], measured
    )
    if miss(fitted) < 0.1:
        return fitted
    # a bounce in the first frames
    starts = [(measured[first], velocity) for velocity in np.arange(-6.0, 6.01, 0.2)]
    return min(fitted, _fit(law, starts, measured), key=miss)


def _law_score(track: np.ndarray, law: np.ndarray, whole: np.ndarray) -> float:
    """Residual of a track to its law, times the share of steps that are not stalled (between
    ``whole`` views).
    """
    residual = np.sqrt(np.nanmean(((track - law) ** 2).sum(axis=1)))
    expected = np.linalg.norm(np.diff(law, axis=0), axis=1)
    taken = np.linalg.norm(np.diff(track, axis=0), axis=1)
    moving = (expected > 0.4) & whole[1:] & whole[:-1]
    stalled = float(np.mean(moving & (taken < 0.25 * expected)))
    return float(_ramp(residual, RESIDUAL_BAND)) * max(0.0, 1.0 - STALL_WEIGHT * stalled)


def _fit_laws(body: TrackedBody, said: Caption) -> list[np.ndarray]:
    """The motions ``[T, 2]`` that the caption allows, fitted to a track; none to a short one."""
    if (~np.isnan(body.track[:, 0])).sum() < FEWEST_FRAMES:
        return []
    across = _fit_free(body.track[:, 0], body.radius)
    if said.family != "fall":
        down = [_fit_free(body.track[:, 1], body.radius)]
    else:
        values = [ELASTICITY[said.elasticity]] if said.elasticity else list(ELASTICITY.values())
        down = [_fit_fall(body.track[:, 1], body.radius, value) for value in values]
    return [np.stack([across, heights], axis=1) for heights in down]


def _physics_score(body: TrackedBody, said: Caption, laws: list[np.ndarray]) -> float | None:
    if not laws:
        return None
    pace = 1.0
    if said.family != "fall":
        steps = np.linalg.norm(np.diff(laws[0], axis=0), axis=1)
        pace = min(1.0, float(np.median(steps)) / CREEP)
    whole = ~np.isnan(body.radii)
    return pace * max(_law_score(body.track, law, whole) for law in laws)


def _rhythm_score(body: TrackedBody, laws: list[np.ndarray]) -> float | None:
    """From the change of the distance to the law from frame to frame: a slow wander is physics'."""
    unevenness = []
    for law in laws:
        changes = np.diff(body.track - law, axis=0)
        unevenness.append(np.sqrt(np.nanmean((changes**2).sum(axis=1))))
    return float(_ramp(min(unevenness), RHYTHM_BAND)) if unevenness else None


def _tint_score(body: TrackedBody, floors: np.ndarray) -> float | None:
    """How near its colour is to that of the palette which it is nearest to."""
    index = list(COLOURS).index(body.colour)
    colours = body.paints + floors - FLOOR
    away = np.linalg.norm(colours - PAINTS[index], axis=1) / PAINT_NORMS[index]
    return _mean(_ramp(away, TINT_BAND))


# ---- permanence ----------------------------------------------------------------------------------


def _first_look(values: np.ndarray) -> np.ndarray:
    known = values[~np.isnan(values.reshape(len(values), -1)[:, 0])]
    return (
        np.median(known[:FIRST_LOOK], axis=0) if len(known) else np.full(values.shape[1:], np.nan)
    )


def _sameness(body: TrackedBody) -> np.ndarray:
    """How much a body is there, looking as it did at first ``[T]``; frames in which it is half
    hidden count as same.
    """
    paint, radius = _first_look(body.paints), _first_look(body.radii)
    norms = np.linalg.norm(body.paints, axis=1)
    norm = max(float(np.linalg.norm(paint)), 1e-6)
    hue = np.degrees(
        np.arccos(np.clip(body.paints @ paint / np.maximum(norms * norm, 1e-9), -1, 1))
    )
    own = SHAPES.index(body.shape)
    other = np.delete(body.shape_errors, own, axis=1).min(axis=1)
    same = (
        _ramp(hue, HUE_BAND)
        * _ramp(np.abs(np.log(np.maximum(norms, 1e-6) / norm)), BRIGHTNESS_BAND)
        * _ramp(np.abs(np.log(body.radii / radius)), GROWTH_BAND)
        * _ramp(
            body.shape_errors[:, own] / np.maximum(body.shape_errors[:, own] + other, 1e-9),
            SHAPE_BAND,
        )
    )
    return np.where(body.present | body.hidden, np.where(np.isnan(same), 1.0, same), 0.0)


def _permanence_score(
    scene: list[TrackedBody],
    sameness: list[np.ndarray],
    others: list[TrackedBody],
    floors: np.ndarray,
) -> float:
    intruders = sum((body.present.astype(float) for body in others), np.zeros(len(floors)))
    steady = _ramp(np.linalg.norm(floors - FLOOR, axis=1), FLOOR_BAND)
    return float(np.mean(np.min(sameness, axis=0) * steady / (1.0 + intruders)))


# ---- windows -------------------------------------------------------------------------------------


def _match(
    said: Caption, looks: list[list[dict[str, float | None]]], count: int
) -> list[int | None]:
    """Which body of the scene (None: none) stands for each body of the caption, by the sum of what
    agrees.
    """
    names = len(said.bodies)
    options: list[int | None] = [*range(count), *[None] * max(0, names - count)]

    def agreement(choice: Iterable[int | None]) -> float:
        pairs = [looks[i][j] for i, j in enumerate(choice) if j is not None]
        return sum(
            IDENTITY[name] * (value or 0.0) for look in pairs for name, value in look.items()
        )

    return list(max(permutations(options, names), key=agreement))


def _look_scores(
    body: TrackedBody, word: CaptionedBody, family: str, initial: bool
) -> dict[str, float | None]:
    return {
        "colour": _colour_score(body, word.colour),
        "shape": _shape_score(body, word.shape),
        "size": _size_score(body, word.size),
        "direction": _direction_score(body, word.direction, family, initial),
    }


def _order_score(parsed: ParsedClip, back: int, front: int) -> float | None:
    """Share of the overlap in which the front body is seen."""
    if (front, back) in parsed.overlaps:
        return _mean(parsed.overlaps[front, back])
    return _mean(1.0 - parsed.overlaps[back, front]) if (back, front) in parsed.overlaps else None


def _find_stated(said: Caption) -> set[str]:
    """Attributes that this caption lets a long enough clip be judged by, wherever bodies overlap or
    not.
    """
    words = {
        name for body in said.bodies for name, word in asdict(body).items() if word is not None
    }
    return words | {"number", "physics", "permanence"} | ({"speed"} if said.speed else set())


def _scene(parsed: ParsedClip) -> list[int]:
    """The bodies that are there most of the time; failing that, the one that is there longest."""
    shares = {
        i: float(np.mean(body.present | body.hidden))
        for i, body in enumerate(parsed.bodies)
        if body.present.any() and not _mush(body) >= FORM_BAND[1]
    }
    most = [i for i, share in shares.items() if share >= PRESENT]
    return most or sorted(shares, key=lambda i: shares[i])[-1:]


def _score_window(
    parsed: ParsedClip,
    sameness: list[np.ndarray],
    said: Caption,
    initial: bool,
    fidelity: Fidelity | None,
) -> WorldScore:
    main = _scene(parsed)
    if not main:
        names = _find_stated(said) | (set() if fidelity is None else set(FIDELITY))
        nothing: dict[str, Any] = dict.fromkeys(names, 0.0)
        return WorldScore(**nothing)
    scene = [parsed.bodies[i] for i in main]
    looks = [
        [_look_scores(body, word, said.family, initial) for body in scene] for word in said.bodies
    ]
    match = _match(said, looks, len(scene))
    found = [(i, j) for i, j in enumerate(match) if j is not None]
    count = np.median(sum((body.present | body.hidden).astype(int) for body in parsed.bodies))
    laws = {j: _fit_laws(scene[j], said) for _, j in found}
    physics = [_physics_score(scene[j], said, laws[j]) for j in laws]
    order = None
    if said.ordered and len(found) == 2:
        order = _order_score(parsed, main[found[0][1]], main[found[1][1]])
    look_means: dict[str, Any] = {
        name: _mean(looks[i][j][name] for i, j in found)
        for name in ("colour", "shape", "size", "direction")
    }
    result = WorldScore(
        **look_means,
        speed=_mean(_speed_score(scene[j], said.speed) for _, j in found),
        number=max(0.0, 1.0 - abs(float(count) - len(said.bodies)) / len(said.bodies)),
        order=order,
        physics=min((value for value in physics if value is not None), default=None),
        permanence=_permanence_score(
            scene,
            [sameness[i] for i in main],
            [body for i, body in enumerate(parsed.bodies) if i not in main],
            parsed.floors,
        ),
    )
    if fidelity is not None:
        result = replace(
            result,
            outline=_ramp_mean(fidelity.boundary, OUTLINE_BAND),
            background=_ramp_mean(fidelity.background, BACKGROUND_BAND),
            tint=_mean(_tint_score(scene[j], parsed.floors) for j in laws),
            rhythm=_mean(_rhythm_score(scene[j], laws[j]) for j in laws),
        )
    if len(parsed.floors) < FEWEST_FRAMES:
        return result
    unmeasured = [name for name in _find_stated(said) if getattr(result, name) is None]
    missed: dict[str, Any] = dict.fromkeys(unmeasured, 0.0)
    return replace(result, **missed)


def _window_bounds(num_frames: int, window: int) -> list[tuple[int, int]]:
    """Consecutive windows; a remainder shorter than half a window joins the last one."""
    starts = list(range(0, num_frames, window))
    if len(starts) > 1 and num_frames - starts[-1] < window / 2:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_frames]))


def _between(parsed: ParsedClip, start: int, stop: int) -> ParsedClip:
    cut = slice(start, stop)
    bodies = tuple(
        replace(
            body,
            track=body.track[cut],
            paints=body.paints[cut],
            radii=body.radii[cut],
            shape_errors=body.shape_errors[cut],
            present=body.present[cut],
            hidden=body.hidden[cut],
        )
        for body in parsed.bodies
    )
    return ParsedClip(
        bodies,
        parsed.floors[cut],
        {pair: share[cut] for pair, share in parsed.overlaps.items()},
    )


def score_parsed(
    parsed: ParsedClip,
    prompt: str,
    window: int | None = None,
    fidelity: Fidelity | None = None,
) -> WorldScore:
    """``score`` of a clip that is already parsed; one parse serves several prompts.

    Args:
        fidelity: of ``measure_fidelity``; None leaves open how truly the clip is drawn.

    Raises:
        ValueError: if ``window`` is under 4 frames or the prompt names no shape of this world.
    """
    if window is not None and window < FEWEST_FRAMES:
        raise ValueError(
            f"window={window}: the law of motion needs windows of at least {FEWEST_FRAMES} frames"
        )
    said = read_caption(prompt)
    sameness = [_sameness(body) for body in parsed.bodies]
    bounds = _window_bounds(len(parsed.floors), window or WINDOW)
    windows = tuple(
        _score_window(
            _between(parsed, start, stop),
            [same[start:stop] for same in sameness],
            said,
            start == 0,
            None if fidelity is None else fidelity.between(start, stop),
        )
        for start, stop in bounds
    )
    names = (*ATTRIBUTES, *FIDELITY)
    means = {name: _mean(getattr(each, name) for each in windows) for name in names}
    return WorldScore(**means, windows=windows if window else ())


def score(frames: Tensor, prompt: str, window: int | None = None) -> WorldScore:
    """Scores of a clip ``frames [T, 3, 64, 64]`` in [0, 1] against the sentence that it was made
    from.

    ``window`` (frames) adds the scores of consecutive windows; the clip's are the mean of its
    windows.

    Raises:
        ValueError: if the frames have another shape, ``window`` is under 4, or the prompt names no
            shape.
    """
    parsed = parse(frames)
    return score_parsed(parsed, prompt, window, measure_fidelity(frames, parsed))


def mean_scores(scores: Iterable[WorldScore]) -> dict[str, float]:
    """Mean of each attribute over the clips in which it applies, and of ``overall`` and
    ``fidelity`` over all of them.
    """
    scores = list(scores)
    names = (*ATTRIBUTES, "overall", *FIDELITY, "fidelity")
    means = {name: _mean(getattr(each, name) for each in scores) for name in names}
    return {name: value for name, value in means.items() if value is not None}
