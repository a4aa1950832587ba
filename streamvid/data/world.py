"""The verifiable world: procedural clips whose captions can be checked against their pixels.

Three families, on a plain dark floor of 64 x 64 pixels at 16 frames per second, of any length:

- ``move``: one shape with constant velocity that bounces off the walls;
- ``fall``: a ball under gravity that bounces on the floor with a stated elasticity;
- ``cross``: two shapes on one line that meet again and again, one passing behind the other.

``sample_spec`` draws a scene, ``render`` draws its frames, ``caption`` writes it in one of several
paraphrases of a small English grammar and ``read_caption`` reads any of them back. What is measured
from pixels is in ``streamvid.evaluation.world_score``.

Units: pixels and frames; x to the right, y downwards; a velocity is in pixels per frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from streamvid.seeding import key_to_seed

SIZE = 64
BACKGROUND = (0.10, 0.10, 0.12)
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.70, 0.25, 0.85),
    "white": (0.92, 0.92, 0.92),
}
SHAPES = ("circle", "square", "triangle")
RADII = {"small": 6.0, "large": 9.0}
CROSS_RADIUS = 7.0
SPEEDS = {"slow": 0.6, "medium": 1.1, "fast": 2.0}
DIAGONAL = 0.5**0.5
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-right": (DIAGONAL, -DIAGONAL),
    "up-left": (-DIAGONAL, -DIAGONAL),
    "down-right": (DIAGONAL, DIAGONAL),
    "down-left": (-DIAGONAL, DIAGONAL),
}
GRAVITY = 0.30
DRIFT = 0.6
ELASTICITY = {"high": 0.85, "low": 0.50}
REST_SPEED = 0.5  # a rebound slower than this ends in rest


@dataclass(frozen=True)
class Body:
    """One shape: its look and its state at frame 0 (centre and velocity)."""

    colour: str
    shape: str
    radius: float
    x: float
    y: float
    vx: float
    vy: float


@dataclass(frozen=True)
class WorldSpec:
    """A scene: ``bodies`` from back to front; ``elasticity`` ("high", "low") only in the family
    ``fall``.
    """

    family: str
    bodies: tuple[Body, ...]
    elasticity: str | None = None


@dataclass(frozen=True)
class CaptionedBody:
    """The words of a caption about one body; None where it says nothing."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    direction: str | None = None


@dataclass(frozen=True)
class Caption:
    """What a caption says: bodies from back to front where it tells, else in the order of the
    sentence.
    """

    family: str
    bodies: tuple[CaptionedBody, ...]
    speed: str | None = None
    elasticity: str | None = None
    ordered: bool = False
    """True when the caption says who is in front."""


# ---- motion --------------------------------------------------------------------------------------


def fold(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """Free motion reflected at two walls (a triangle wave)."""
    span = high - low
    phase = np.mod(position - low, 2 * span)
    return low + np.where(phase < span, phase, 2 * span - phase)


def fall_heights(
    y0: float, vy0: float, floor: float, elasticity: float, num_frames: int
) -> np.ndarray:
    """Heights of a ball under ``GRAVITY`` whose speed is scaled by ``elasticity`` at each bounce
    (exact).
    """
    heights = np.empty(num_frames)
    start, y, vy = 0.0, y0, vy0
    for frame in range(num_frames):
        while True:
            landing = start + (-vy + np.sqrt(vy * vy + 2 * GRAVITY * max(0.0, floor - y))) / GRAVITY
            if landing > frame or landing <= start:
                break
            rebound = elasticity * (vy + GRAVITY * (landing - start))
            start, y = landing, floor
            vy = -rebound if rebound > REST_SPEED else 0.0
        elapsed = frame - start
        heights[frame] = min(floor, y + vy * elapsed + 0.5 * GRAVITY * elapsed * elapsed)
    return heights


def positions(spec: WorldSpec, num_frames: int) -> np.ndarray:
    """Centres ``[bodies, num_frames, 2]`` (x, y) in pixels."""
    time = np.arange(num_frames, dtype=np.float64)
    tracks = []
    for body in spec.bodies:
        low, high = body.radius, SIZE - body.radius
        x = fold(body.x + body.vx * time, low, high)
        if spec.family == "fall":
            y = fall_heights(body.y, body.vy, high, ELASTICITY[spec.elasticity], num_frames)
        else:
            y = fold(body.y + body.vy * time, low, high)
        tracks.append(np.stack([x, y], axis=-1))
    return np.stack(tracks)


# ---- drawing -------------------------------------------------------------------------------------


def signed_distance(
    shape: str, dx: np.ndarray, dy: np.ndarray, radius: float | np.ndarray
) -> np.ndarray:
    """Distance to the outline, negative inside; every shape fits in the circle of ``radius`` or
    nearly so.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        half = 0.88 * radius
        return np.maximum(np.abs(dx), np.abs(dy)) - half
    inradius = 0.62 * radius  # equilateral, point upwards, centred on its centroid
    slanted = 0.5 * (np.sqrt(3.0) * np.abs(dx) - dy)
    return np.maximum(dy, slanted) - inradius


def render(spec: WorldSpec, num_frames: int) -> Tensor:
    """Frames ``[num_frames, 3, 64, 64]`` in [0, 1], anti-aliased.

    Raises:
        ValueError: unless ``num_frames`` is at least 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a clip has at least 1 frame")
    grid = np.arange(SIZE) + 0.5
    frames = np.empty((num_frames, 3, SIZE, SIZE), dtype=np.float32)
    frames[:] = np.asarray(BACKGROUND, dtype=np.float32)[None, :, None, None]
    for body, track in zip(spec.bodies, positions(spec, num_frames)):
        dx = grid[None, None, :] - track[:, 0, None, None]
        dy = grid[None, :, None] - track[:, 1, None, None]
        cover = np.clip(0.5 - signed_distance(body.shape, dx, dy, body.radius), 0.0, 1.0)
        cover = cover[:, None].astype(np.float32)  # [T, 1, H, W]
        paint = np.asarray(COLOURS[body.colour], dtype=np.float32)[None, :, None, None]
        frames = frames * (1 - cover) + paint * cover
    return torch.from_numpy(frames)


# ---- sampling ------------------------------------------------------------------------------------


def _start(
    rng: np.random.Generator, radius: float, velocity: float, free_frames: int = 10
) -> float:
    """A coordinate from which ``free_frames`` pass before the first wall."""
    low, high = radius, SIZE - radius
    reach = velocity * free_frames
    return float(rng.uniform(max(low, low - reach), min(high, high - reach)))


def _sample_move(rng: np.random.Generator) -> WorldSpec:
    radius = RADII[str(rng.choice(list(RADII)))]
    speed = SPEEDS[str(rng.choice(list(SPEEDS)))]
    ux, uy = DIRECTIONS[str(rng.choice(list(DIRECTIONS)))]
    vx, vy = speed * ux, speed * uy
    body = Body(
        str(rng.choice(list(COLOURS))),
        str(rng.choice(SHAPES)),
        radius,
        _start(rng, radius, vx),
        _start(rng, radius, vy),
        vx,
        vy,
    )
    return WorldSpec("move", (body,))


def _sample_fall(rng: np.random.Generator) -> WorldSpec:
    radius = RADII[str(rng.choice(list(RADII)))]
    vx = DRIFT * float(rng.choice([-1.0, 0.0, 1.0]))
    body = Body(
        str(rng.choice(list(COLOURS))),
        "circle",
        radius,
        _start(rng, radius, vx, 20),
        float(rng.uniform(radius + 1, radius + 14)),
        vx,
        0.0,
    )
    return WorldSpec("fall", (body,), str(rng.choice(list(ELASTICITY))))


def _sample_cross(rng: np.random.Generator) -> WorldSpec:
    colours = rng.choice(list(COLOURS), size=2, replace=False)
    shapes = rng.choice(SHAPES, size=2)
    speed = SPEEDS[str(rng.choice(list(SPEEDS)))]
    towards = float(rng.choice([-1.0, 1.0]))
    gap = float(rng.uniform(18.0, min(46.0, 2 * speed * 22)))
    room = SIZE / 2 - CROSS_RADIUS - gap / 2
    middle = SIZE / 2 + float(rng.uniform(-room, room))
    height = float(rng.uniform(14.0, SIZE - 14.0))
    offset = float(rng.uniform(-2.0, 2.0))
    bodies = tuple(
        Body(
            str(colours[i]),
            str(shapes[i]),
            CROSS_RADIUS,
            middle - side * gap / 2,
            height + side * offset,
            side * speed,
            0.0,
        )
        for i, side in enumerate((towards, -towards))
    )
    return WorldSpec("cross", bodies)


SAMPLERS = {"move": _sample_move, "fall": _sample_fall, "cross": _sample_cross}
FAMILY_WEIGHTS = {"move": 0.5, "fall": 0.2, "cross": 0.3}


def is_held_out(spec: WorldSpec) -> bool:
    """True for one in eight combinations of everything a caption can say; these are never trained
    on.
    """
    said = describe(spec)
    return key_to_seed("held-out", repr(replace(said, ordered=True))) % 8 == 0


def sample_spec(seed: int, *, family: str | None = None, held_out: bool = False) -> WorldSpec:
    """The scene of a seed, from the training combinations or from the held-out ones.

    Raises:
        ValueError: if ``family`` is not one of the three.
    """
    if family is not None and family not in SAMPLERS:
        raise ValueError(f"family={family!r} is not one of {', '.join(SAMPLERS)}")
    rng = np.random.default_rng(key_to_seed("world", seed, int(held_out)))
    chosen = family or str(rng.choice(list(FAMILY_WEIGHTS), p=list(FAMILY_WEIGHTS.values())))
    while True:
        spec = SAMPLERS[chosen](rng)
        if is_held_out(spec) == held_out:
            return spec


# ---- captions ------------------------------------------------------------------------------------

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
SPEED_ADVERBS = {
    "slow": ("slowly", "at a slow pace"),
    "medium": ("steadily", "at a medium pace"),
    "fast": ("quickly", "at a fast pace"),
}
SPEED_ADJECTIVES = {"slow": "slow", "medium": "steady", "fast": "fast"}
DIRECTION_WORDS = {
    "right": ("to the right", "rightwards"),
    "left": ("to the left", "leftwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up-right": ("up and to the right", "towards the upper right"),
    "up-left": ("up and to the left", "towards the upper left"),
    "down-right": ("down and to the right", "towards the lower right"),
    "down-left": ("down and to the left", "towards the lower left"),
}
DRIFT_WORDS = {
    "down": "straight down",
    "right": "drifting to the right",
    "left": "drifting to the left",
}
ELASTICITY_WORDS = {
    "high": ("bounces high", "is very bouncy"),
    "low": ("bounces low", "is hardly bouncy"),
}


def _name_of(table: dict[str, float], value: float) -> str:
    return min(table, key=lambda name: abs(table[name] - value))


def direction_of(vx: float, vy: float) -> str:
    """The name of the nearest of the eight directions."""
    return max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * vx + DIRECTIONS[name][1] * vy)


def describe(spec: WorldSpec) -> Caption:
    """Everything that a caption of this scene says."""
    if spec.family == "fall":
        body = spec.bodies[0]
        direction = "down" if body.vx == 0 else direction_of(body.vx, 0.0)
        said = CaptionedBody(body.colour, "circle", _name_of(RADII, body.radius), direction)
        return Caption("fall", (said,), None, spec.elasticity)
    sized = spec.family == "move"
    bodies = tuple(
        CaptionedBody(
            b.colour,
            b.shape,
            _name_of(RADII, b.radius) if sized else None,
            direction_of(b.vx, b.vy),
        )
        for b in spec.bodies
    )
    first = spec.bodies[0]
    return Caption(
        spec.family, bodies, _name_of(SPEEDS, float(np.hypot(first.vx, first.vy))), None, not sized
    )


def _caption_move(said: Caption, pick) -> str:
    body = said.bodies[0]
    size, direction = pick(SIZE_WORDS[body.size]), pick(DIRECTION_WORDS[body.direction])
    adverb, adjective = pick(SPEED_ADVERBS[said.speed]), SPEED_ADJECTIVES[said.speed]
    verb = pick(("moves", "glides", "travels"))
    return pick(
        (
            f"a {size} {body.colour} {body.shape} {verb} {direction} {adverb}",
            (
                f"a {adjective} {size} {body.colour} {body.shape} {verb} {direction} and bounces"
                " off the walls"
            ),
            f"the {body.shape} is {size} and {body.colour} and {verb} {direction} {adverb}",
        )
    )


def _caption_fall(said: Caption, pick) -> str:
    body = said.bodies[0]
    size, drift, bounce = (
        pick(SIZE_WORDS[body.size]),
        DRIFT_WORDS[body.direction],
        pick(ELASTICITY_WORDS[said.elasticity]),
    )
    return pick(
        (
            f"a {size} {body.colour} ball falls {drift} and {bounce}",
            f"a {size} {body.colour} ball drops {drift}, it {bounce}",
            f"the ball is {size} and {body.colour}, falls {drift} and {bounce}",
        )
    )


def _caption_cross(said: Caption, pick) -> str:
    back, front = said.bodies
    adverb = pick(SPEED_ADVERBS[said.speed])
    verb = pick(("moves", "glides", "travels"))
    return pick(
        (
            (
                f"a {back.colour} {back.shape} {verb} {pick(DIRECTION_WORDS[back.direction])}"
                f" {adverb} and passes behind a {front.colour} {front.shape}"
            ),
            (
                f"a {front.colour} {front.shape} {verb} {pick(DIRECTION_WORDS[front.direction])}"
                f" {adverb} and passes in front of a {back.colour} {back.shape}"
            ),
        )
    )


CAPTIONERS = {"move": _caption_move, "fall": _caption_fall, "cross": _caption_cross}


def caption(spec: WorldSpec, variant: int = 0) -> str:
    """One sentence for the scene; ``variant`` chooses among the paraphrases."""
    rng = np.random.default_rng(key_to_seed("caption", variant))
    return CAPTIONERS[spec.family](
        describe(spec), lambda options: options[int(rng.integers(len(options)))]
    )


OPPOSITE = {"left": "right", "right": "left"}
_WORD_OF_SIZE = {word: size for size, words in SIZE_WORDS.items() for word in words}
_SPEED_WORDS = {
    "slowly": "slow",
    "slow": "slow",
    "steadily": "medium",
    "steady": "medium",
    "medium": "medium",
    "quickly": "fast",
    "fast": "fast",
}


def _read_direction(text: str) -> str | None:
    vertical = re.search(r"\b(up|upwards|upper|down|downwards|lower)\b", text)
    sideways = re.search(r"\b(right|left)(wards)?\b", text)
    parts = []
    if vertical:
        parts.append("up" if vertical.group(1).startswith("up") else "down")
    if sideways:
        parts.append(sideways.group(1))
    return "-".join(parts) or None


def _read_bodies(text: str) -> list[CaptionedBody]:
    """Bodies in the order of the sentence; words belong to the noun that they precede or follow
    closest.
    """
    nouns = list(re.finditer(r"\b(circle|square|triangle|ball)\b", text))
    bodies = []
    for i, noun in enumerate(nouns):
        before = text[nouns[i - 1].end() if i else 0 : noun.end()]
        after = text[noun.end() : nouns[i + 1].start() if i + 1 < len(nouns) else len(text)]
        look = before if any(re.search(rf"\b{c}\b", before) for c in COLOURS) else after
        colour = next((c for c in COLOURS if re.search(rf"\b{c}\b", look)), None)
        size = next(
            (_WORD_OF_SIZE[w] for w in re.findall(r"\w+", look) if w in _WORD_OF_SIZE), None
        )
        shape = "circle" if noun.group(1) == "ball" else noun.group(1)
        bodies.append(CaptionedBody(colour, shape, size, _read_direction(after)))
    return bodies


def read_caption(prompt: str) -> Caption:
    """What a caption says, in whichever paraphrase; attributes that it leaves open are None.

    Raises:
        ValueError: if the sentence names no shape of this world.
    """
    text = prompt.lower()
    bodies = _read_bodies(text)
    if not bodies:
        raise ValueError(
            f"no circle, square, triangle or ball in the prompt {prompt!r}; the world score"
            " needs one"
        )
    speed = next((_SPEED_WORDS[w] for w in re.findall(r"\w+", text) if w in _SPEED_WORDS), None)
    if len(bodies) > 1:
        return _read_cross(text, bodies[:2], speed)
    if re.search(r"\b(ball|falls|drops)\b", text):
        bounce = "high" if re.search(r"bounces high|very bouncy", text) else None
        bounce = "low" if re.search(r"bounces low|hardly bouncy", text) else bounce
        drift = re.search(r"drifting to the (left|right)", text)
        direction = drift.group(1) if drift else "down"
        return Caption("fall", (replace(bodies[0], direction=direction),), None, bounce)
    return Caption("move", (bodies[0],), speed)


def _read_cross(text: str, bodies: list[CaptionedBody], speed: str | None) -> Caption:
    first, second = bodies
    second = replace(second, direction=OPPOSITE.get(first.direction))
    if "in front of" in text:
        return Caption("cross", (second, first), speed, None, True)
    return Caption("cross", (first, second), speed, None, "behind" in text)
