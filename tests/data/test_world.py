"""The verifiable world: what is drawn obeys the stated laws, and every caption can be read back."""

import numpy as np
import pytest
import torch

from streamvid.data.world import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    ELASTICITY,
    GRAVITY,
    RADII,
    SIZE,
    SPEEDS,
    Body,
    WorldSpec,
    caption,
    describe,
    is_held_out,
    positions,
    read_caption,
    render,
    sample_spec,
)

FAMILIES = ("move", "fall", "cross")


def scenes(count: int, first: int = 0) -> list[WorldSpec]:
    return [
        sample_spec(seed, family=family, held_out=seed % 2 == 1)
        for family in FAMILIES
        for seed in range(first, first + count)
    ]


def test_every_paraphrase_reads_back():
    """``read_caption`` inverts ``caption`` for every family and a hundred paraphrases of each
    scene.
    """
    for spec in scenes(12):
        said = describe(spec)
        for variant in range(100):
            sentence = caption(spec, variant)
            assert read_caption(sentence) == said, sentence


def test_paraphrases_differ():
    """The grammar has more than one sentence for each scene."""
    assert all(len({caption(spec, variant) for variant in range(60)}) > 5 for spec in scenes(3))


def test_an_open_caption_leaves_attributes_open():
    """Words that are not there are None, and a sentence without a shape is refused by name."""
    said = read_caption("a circle moves")
    assert said.speed is None and said.bodies[0] == type(said.bodies[0])(shape="circle")
    with pytest.raises(ValueError, match="no circle, square, triangle or ball"):
        read_caption("a cat on a mat")


def test_held_out_scenes_are_never_trained_on():
    """No description occurs on both sides of the split, and the seeds of one side repeat."""
    train = {repr(describe(sample_spec(seed))) for seed in range(400)}
    held_out = {repr(describe(sample_spec(seed, held_out=True))) for seed in range(400)}
    assert train.isdisjoint(held_out)
    assert sample_spec(3) == sample_spec(3)
    assert all(is_held_out(sample_spec(seed, held_out=True)) for seed in range(20))


def test_a_longer_clip_begins_with_the_shorter_one():
    """A frame does not depend on how many follow it."""
    for spec in scenes(4):
        assert torch.equal(render(spec, 100)[:33], render(spec, 33))


def test_frames_are_in_range_and_a_clip_has_a_frame():
    """Any length from 1 up is drawn in [0, 1]; 0 frames are refused."""
    spec = sample_spec(0)
    clip = render(spec, 1)
    assert clip.shape == (1, 3, SIZE, SIZE) and clip.min() >= 0 and clip.max() <= 1
    with pytest.raises(ValueError, match="at least 1 frame"):
        render(spec, 0)
    with pytest.raises(ValueError, match="move, fall, cross"):
        sample_spec(0, family="swim")


def test_colours_are_those_of_the_palette():
    """The floor is the floor colour, and the middle of a body is exactly its own."""
    spec = WorldSpec("move", (Body("yellow", "square", RADII["large"], 32.0, 32.0, 0.0, 0.0),))
    frame = render(spec, 1)[0]
    assert torch.allclose(frame[:, 0, 0], torch.tensor(BACKGROUND))
    assert torch.allclose(frame[:, 32, 32], torch.tensor(COLOURS["yellow"]))


def test_the_body_in_front_hides_the_other():
    """Later bodies are drawn over earlier ones."""
    back, front = (Body(c, "circle", 7.0, 32.0, 32.0, 0.0, 0.0) for c in ("red", "blue"))
    assert torch.allclose(
        render(WorldSpec("cross", (back, front)), 1)[0, :, 32, 32], torch.tensor(COLOURS["blue"])
    )


def test_free_flight_conserves_speed_and_turns_only_at_walls():
    """A step is either the whole velocity or straddles a wall, and the centre never comes nearer
    than the radius.
    """
    for spec in [s for s in scenes(8) if s.family != "fall"]:
        for body, track in zip(spec.bodies, positions(spec, 400)):
            assert track.min() >= body.radius - 1e-9 and track.max() <= SIZE - body.radius + 1e-9
            for axis, speed in ((0, abs(body.vx)), (1, abs(body.vy))):
                steps = np.abs(np.diff(track[:, axis]))
                turned = steps < speed - 1e-9
                wall = np.minimum(track[:, axis] - body.radius, SIZE - body.radius - track[:, axis])
                assert steps.max() <= speed + 1e-9
                assert (np.minimum(wall[1:], wall[:-1])[turned] <= speed).all()


@pytest.mark.parametrize("word", list(ELASTICITY))
def test_the_first_rebound_has_the_stated_elasticity(word):
    """Energy: the apex after a bounce is elasticity squared of the drop, to the sampling of a
    frame.
    """
    drop = 60.0 - 2 * RADII["small"]
    body = Body("red", "circle", RADII["small"], 32.0, SIZE - RADII["small"] - drop, 0.0, 0.0)
    heights = SIZE - RADII["small"] - positions(WorldSpec("fall", (body,), word), 60)[0, :, 1]
    landing = int(np.argmax(np.diff(heights) > 0))
    apex = heights[landing + 1 : landing + 30].max()
    assert apex == pytest.approx(ELASTICITY[word] ** 2 * drop, abs=GRAVITY / 8 + 1e-6)


def test_a_ball_comes_to_rest_on_the_floor():
    """A fall ends on the floor, not in it and not in a bounce for ever."""
    for spec in [s for s in scenes(6) if s.family == "fall"]:
        body, track = spec.bodies[0], positions(spec, 600)[0]
        assert track[:, 1].max() <= SIZE - body.radius
        assert (track[-50:, 1] == SIZE - body.radius).all()


def test_the_words_are_the_motion():
    """Direction and speed of a description are those of the first steps."""
    for spec in [s for s in scenes(8) if s.family == "move"]:
        said, step = describe(spec), np.diff(positions(spec, 3)[0], axis=0)[0]
        assert np.allclose(
            step, SPEEDS[said.speed] * np.asarray(DIRECTIONS[said.bodies[0].direction])
        )
