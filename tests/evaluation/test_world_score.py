"""The measuring instrument, measured: true clips score 1, and each corruption costs its own
attribute alone.
"""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from streamvid.data.world import (
    BACKGROUND,
    COLOURS,
    SHAPES,
    SIZE,
    SPEEDS,
    WorldSpec,
    caption,
    describe,
    positions,
    render,
    sample_spec,
)
from streamvid.evaluation.outline import measure_fidelity
from streamvid.evaluation.world_score import (
    ATTRIBUTES,
    FIDELITY,
    WorldScore,
    mean_scores,
    parse,
    score,
    score_parsed,
)

FAMILIES = ("move", "fall", "cross")
T = 33
FLOOR = torch.tensor(BACKGROUND)[:, None, None]


def scenes(count: int, first: int = 0) -> list[WorldSpec]:
    """Scenes of each family, every other one held out."""
    return [
        sample_spec(seed, family=family, held_out=seed % 2 == 1)
        for family in FAMILIES
        for seed in range(first, first + count)
    ]


def soft_and_noisy(frames: torch.Tensor, seed: int) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(0.0, 0.02, frames.shape)
    return torch.from_numpy(
        np.clip(gaussian_filter(frames.numpy(), (0, 0, 0.7, 0.7)) + noise, 0, 1)
    ).float()


def jpeg(frames: torch.Tensor, quality: int = 75) -> torch.Tensor:
    images = []
    for frame in (frames.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8):
        buffer = BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        images.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def halved(frames: torch.Tensor) -> torch.Tensor:
    small = torch.nn.functional.interpolate(frames, scale_factor=0.5, mode="area")
    return torch.nn.functional.interpolate(small, size=SIZE, mode="bicubic").clamp(0, 1)


def least(scores: list[WorldScore]) -> float:
    """The lowest mean of what clips show."""
    means = mean_scores(scores)
    return min(means[name] for name in (*ATTRIBUTES, "overall") if name in means)


# ---------------------------------------------------------------- true clips


def test_true_clips_score_one():
    """Rendered clips of every family, train and held-out, under any paraphrase: each mean and the
    worst clip.
    """
    scores = [score(render(spec, T), caption(spec, i)) for i, spec in enumerate(scenes(24))]
    assert set(mean_scores(scores)) == {*ATTRIBUTES, "overall", *FIDELITY, "fidelity"}
    assert least(scores) >= 0.995
    assert min(min(each.attributes().values()) for each in scores) >= 0.95


def test_parse_returns_the_scene():
    """Colour, shape, radius and every measured centre (to half a pixel, occlusions included) come
    back.
    """
    for spec in scenes(12, first=100):
        estimate = parse(render(spec, T))
        assert len(estimate.bodies) == len(spec.bodies)
        by_colour = {body.colour: body for body in estimate.bodies}
        for body, track in zip(spec.bodies, positions(spec, T)):
            found = by_colour[body.colour]
            assert found.shape == body.shape and abs(found.radius - body.radius) < 0.2
            assert np.nanmax(np.abs(found.track - track)) <= 0.5
            assert (found.present | found.hidden).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_long_streams_score_one_in_every_window(family):
    """Ten windows of 32 frames of a clip of 321: bounces and rest are no drift."""
    for seed in range(4):
        spec = sample_spec(seed, family=family)
        result = score(render(spec, 321), caption(spec, seed), window=32)
        assert len(result.windows) == 10
        for index, each in enumerate(result.windows):
            assert min(each.attributes().values()) >= 0.98, (seed, index, each)


def test_a_window_from_the_middle_scores_one():
    """A clip that starts at frame 100 obeys the law as well; only its heading is not the
    caption's.
    """
    scores = []
    for seed, spec in enumerate(scenes(8)):
        scores.append(replace(score(render(spec, 132)[100:], caption(spec, seed)), direction=None))
    assert least(scores) >= 0.98


@pytest.mark.parametrize(
    "degrade", [lambda f: soft_and_noisy(f, 0), jpeg, halved], ids=["blur", "jpeg", "halved"]
)
def test_a_lossy_codec_costs_next_to_nothing(degrade):
    """Blur with noise, JPEG with subsampled chroma, and half resolution: at most 0.02 of any
    attribute.
    """
    scores = [
        score(degrade(render(spec, T)), caption(spec, i))
        for i, spec in enumerate(scenes(14, first=200))
    ]
    assert least(scores) >= 0.98


# ---------------------------------------------------------------- corrupted clips


def change(spec: WorldSpec, **fields) -> WorldSpec:
    """The scene with its first body changed."""
    return replace(spec, bodies=(replace(spec.bodies[0], **fields), *spec.bodies[1:]))


def other(options, *used: str) -> str:
    return next(option for option in options if option not in used)


def wrong_colour(spec):
    return render(change(spec, colour=other(COLOURS, *(body.colour for body in spec.bodies))), T)


def wrong_shape(spec):
    return render(change(spec, shape=other(SHAPES, spec.bodies[0].shape)), T)


def wrong_size(spec):
    body, radius = spec.bodies[0], 15.0 - spec.bodies[0].radius
    x, y = (float(np.clip(value, radius, SIZE - radius)) for value in (body.x, body.y))
    return render(change(spec, radius=radius, x=x, y=y), T)


def reversed_direction(spec):
    if spec.family != "move":
        return render(spec, T).flip(-1)
    return render(change(spec, vx=-spec.bodies[0].vx, vy=-spec.bodies[0].vy), T)


def wrong_speed(spec):
    word = describe(spec).speed
    factor = SPEEDS["slow" if word == "medium" else "medium"] / SPEEDS[word]
    bodies = tuple(replace(body, vx=factor * body.vx, vy=factor * body.vy) for body in spec.bodies)
    return render(replace(spec, bodies=bodies), T)


def teleport(spec):
    """From frame 17 the first body goes on from elsewhere, inside the walls."""
    body = spec.bodies[0]
    room = SIZE - 2 * body.radius
    jump = {"y": body.y + (12 if body.y < SIZE / 2 else -12)}
    if spec.family != "cross":
        jump = {"x": body.radius + (body.x + 18 - body.radius) % room}
    return torch.cat([render(spec, T)[:17], render(change(spec, **jump), T)[17:]])


def vanished(spec):
    """The first body is gone for eight frames, in which the others do not hide it."""
    frames = render(spec, T)
    first = 12 if len(spec.bodies) == 1 else 25 if spec.bodies[0].x > 99 else 0
    if len(spec.bodies) == 1:
        frames[first : first + 8] = FLOOR
    else:
        frames[first : first + 8] = render(replace(spec, bodies=spec.bodies[1:]), T)[
            first : first + 8
        ]
    return frames


def frozen(spec):
    frames = render(spec, T)
    frames[14:20] = frames[13]
    return frames


def frozen_once(spec):
    frames = render(spec, T)
    frames[14] = frames[13]
    return frames


def flicker(spec):
    gains = np.random.default_rng(0).uniform(0.75, 1.25, (T, 1, 1, 1))
    return (render(spec, T) * torch.from_numpy(gains).float()).clamp(0, 1)


def body_flicker(spec):
    gains = np.random.default_rng(0).uniform(0.65, 1.0, (T, 1, 1, 1))
    return FLOOR + (render(spec, T) - FLOOR) * torch.from_numpy(gains).float()


def second_body(spec):
    body = spec.bodies[0]
    room = SIZE - 2 * body.radius
    x, y = (body.radius + (value + 25 - body.radius) % room for value in (body.x, body.y))
    extra = replace(body, colour=other(COLOURS, body.colour), x=x, y=y)
    return render(replace(spec, bodies=(extra, body)), T)


def swapped_order(spec):
    return render(replace(spec, bodies=spec.bodies[::-1]), T)


def wrong_elasticity(spec):
    return render(replace(spec, elasticity=other(("high", "low"), spec.elasticity)), T)


def turned_in_mid_air(spec):
    frames = render(spec, T)
    return torch.cat([frames[:17], frames[:16].flip(0)])


CORRUPTIONS = [
    (wrong_colour, "colour", FAMILIES, 0.4),
    (wrong_shape, "shape", ("move", "cross"), 0.4),
    (wrong_size, "size", ("move", "fall"), 0.9),
    (reversed_direction, "direction", FAMILIES, 0.9),
    (wrong_speed, "speed", ("move", "cross"), 0.9),
    (teleport, "physics", FAMILIES, 0.5),
    (vanished, "permanence", FAMILIES, 0.15),
    (frozen, "physics", FAMILIES, 0.5),
    (frozen_once, "physics", FAMILIES, 0.1),
    (flicker, "permanence", FAMILIES, 0.15),
    (body_flicker, "permanence", FAMILIES, 0.15),
    (second_body, "number", ("move",), 0.9),
    (swapped_order, "order", ("cross",), 0.9),
    (wrong_elasticity, "physics", ("fall",), 0.5),
    (turned_in_mid_air, "physics", ("move", "cross"), 0.5),
]


def suits(corrupt, spec: WorldSpec) -> bool:
    """Whether the corruption is one in this scene: free flight around the changed frames, room to
    reverse.
    """
    tracks = positions(spec, T)
    body = spec.bodies[0]
    if corrupt is reversed_direction:
        away = np.asarray([body.x - 8 * body.vx, body.y - 8 * body.vy])
        inside = (away >= body.radius).all() and (away <= SIZE - body.radius).all()
        return spec.family == "cross" or (body.vx != 0 if spec.family == "fall" else bool(inside))
    if corrupt is turned_in_mid_air:
        return bool(
            (tracks[0, 13:21] > body.radius + 3).all()
            and (tracks[0, 13:21] < SIZE - body.radius - 3).all()
        )
    if corrupt is vanished and spec.family == "cross":
        return bool((np.linalg.norm(tracks[0] - tracks[1], axis=1)[:8] > 18).all())
    return True


@pytest.mark.parametrize(
    "corrupt, attribute, families, loss", CORRUPTIONS, ids=lambda v: getattr(v, "__name__", None)
)
def test_a_corruption_costs_its_own_attribute_alone(corrupt, attribute, families, loss):
    """Every corrupted clip loses at least ``loss`` (0.1 or more) where it should and at most 0.02
    elsewhere.
    """
    for family in families:
        specs = [sample_spec(seed, family=family) for seed in range(40)]
        specs = [spec for spec in specs if suits(corrupt, spec)][:5]
        assert len(specs) == 5, family
        for spec in specs:
            result = score(corrupt(spec), caption(spec, 1)).attributes()
            assert result.pop(attribute) <= 1 - loss, spec
            assert min(result.values()) >= 0.98, (spec, result)


def test_a_colour_that_changes_costs_permanence():
    """From the middle on another colour: identity is lost, and so is half of the colour; motion
    stays.
    """
    for seed in range(4):
        spec = sample_spec(seed, family="move")
        result = score(torch.cat([render(spec, T)[:17], wrong_colour(spec)[17:]]), caption(spec))
        assert result.permanence < 0.7 and result.colour < 0.7
        assert (
            min(result.physics, result.speed, result.shape, result.direction, result.number) >= 0.98
        )


def test_a_body_that_stops_at_the_wall_breaks_the_law():
    """Stopping for good is as wrong as stopping for a while: in its window, and in a later one that
    only rests.
    """
    spec = change(sample_spec(0, family="move"), x=20.0, y=32.0, vx=2.0, vy=0.0)
    frames = render(spec, 96)
    stop = int(np.argmax(positions(spec, 96)[0, :, 0]))
    frames[stop:] = frames[stop].clone()
    result = score(frames, caption(spec), window=32)
    assert all(each.physics <= 0.2 for each in result.windows)
    assert result.windows[-1].permanence == pytest.approx(1.0)


def test_drift_shows_in_the_windows_where_it_happens():
    """A body that slowly loses its colour and brightness scores 1 early and 0 late, in
    permanence.
    """
    spec = sample_spec(3, family="move")
    frames = render(spec, 160)
    fading = torch.linspace(0.0, 0.5, 160)[:, None, None, None]
    result = score(frames + fading * (FLOOR - frames), caption(spec), window=32)
    permanence = [each.permanence for each in result.windows]
    assert permanence[0] > 0.9 and permanence[-1] < 0.1
    assert permanence == sorted(permanence, reverse=True)
    assert min(each.physics for each in result.windows) >= 0.98


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize(
    "clip",
    [
        torch.zeros(T, 3, SIZE, SIZE),
        torch.ones(T, 3, SIZE, SIZE),
        torch.full((T, 3, SIZE, SIZE), float("nan")),
        torch.rand(T, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)),
        torch.zeros(1, 3, SIZE, SIZE),
    ],
    ids=["black", "white", "nan", "noise", "one black frame"],
)
def test_a_clip_of_nothing_scores_zero(clip):
    """No body, no credit, no NaN: 0 on everything that the caption states."""
    for family in FAMILIES:
        result = score(clip, caption(sample_spec(0, family=family)))
        assert result.overall == 0.0 and len(result.attributes()) >= 6


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_short_clips_are_scored_on_what_they_show(family, num_frames):
    """One frame has no speed, two no law; what applies is 1."""
    spec = sample_spec(1, family=family)
    result = score(render(spec, num_frames), caption(spec))
    assert min(result.attributes().values()) >= 0.98
    assert (result.direction is None) == (num_frames == 1)
    assert (result.physics is None) == (num_frames < 4)


def test_attributes_that_the_caption_leaves_open_are_none():
    """Nothing is measured against a word that is not there."""
    spec = sample_spec(0, family="move")
    result = score(render(spec, T), f"a {spec.bodies[0].shape} moves")
    assert (result.colour, result.size, result.speed, result.direction, result.order) == (None,) * 5
    assert result.overall == pytest.approx(1.0)


def test_one_parse_serves_several_prompts():
    """``score_parsed`` of a parsed clip equals ``score``, with what was measured of the frames."""
    spec = sample_spec(5, family="cross")
    frames, prompt = render(spec, T), caption(spec)
    parsed = parse(frames)
    found = score_parsed(parsed, prompt, 16, measure_fidelity(frames, parsed))
    assert found == score(frames, prompt, window=16)


def test_mean_scores_average_where_applicable():
    """A None neither counts as 0 nor as 1."""
    means = mean_scores([WorldScore(colour=1.0, order=0.5), WorldScore(colour=0.0)])
    assert means == {"colour": 0.5, "order": 0.5, "overall": pytest.approx(0.375)}


def test_bad_input_is_refused():
    """A wrong shape, a window without room for a law, and a prompt of another world say what is
    expected.
    """
    spec = sample_spec(0)
    with pytest.raises(ValueError, match="reads \\[T, 3, 64, 64\\]"):
        parse(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="at least 4 frames"):
        score(render(spec, 8), caption(spec), window=2)
    with pytest.raises(ValueError, match="the world score needs one"):
        score(render(spec, 8), "a cat on a mat")
