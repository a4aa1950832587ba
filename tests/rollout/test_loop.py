"""The loop: gradients where they belong, context where it belongs, and schedules held to their
word.
"""

import itertools

import pytest
import torch

from streamvid.core.process import add_noise, x0_from_v
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import CONTEXT_EVENT, KeyedNoise
from streamvid.rollout.schedule import (
    Denoise,
    autoregressive,
    cost_of,
    full_sequence,
    rolling,
    table,
    truncate,
)

TIMES = (1.0, 0.9, 0.6)
SHAPE, FRAMES = (3, 4, 4), 2


class LeafNoise(KeyedNoise):
    """Keyed noise whose draws can be asked for their gradient."""

    def __init__(self, seeds):
        super().__init__(seeds)
        self.draws = {}

    def draw(self, chunk, event, *where):
        self.draws[chunk, event] = super().draw(chunk, event, *where).requires_grad_()
        return self.draws[chunk, event]


def run(student, cond, schedule, noise=None, **options):
    if "cache" not in options:
        options["cache"] = None if options.get("commit") == "none" else student.new_cache(2, 4, 4)
    noise = noise or KeyedNoise(range(len(cond)))
    return rollout(
        student, cond, schedule, noise, latent_shape=SHAPE, chunk_frames=FRAMES, **options
    )


def reached(output, noise):
    """The (chunk, event) of the draws that the gradient of ``output`` reaches."""
    gradients = torch.autograd.grad(
        output.sum(), noise.draws.values(), allow_unused=True, retain_graph=True
    )
    return {key for key, gradient in zip(noise.draws, gradients) if gradient is not None}


SCHEDULES = {
    "autoregressive": lambda: autoregressive(TIMES, 3),
    "rolling": lambda: rolling(TIMES, 3),
    "full sequence": lambda: full_sequence(TIMES, 3),
    "diagonal": lambda: table([TIMES, TIMES[:2], TIMES[:1]], 3),
}


# ---- gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["clean", "reuse"])
def test_gradient_only_on_taps_and_none_across_chunks(student, cond, commit):
    """A chunk's loss reaches the state its tapped step began from, not earlier steps, not earlier
    chunks.

    In the Self-Forcing lineage it leaks to earlier chunks, through keys that were written with
    their graph. The fake's cache keeps whatever graph it is given, and its ``key`` reaches an
    output through it only.
    """
    noise = LeafNoise([3, 4])
    results = list(run(student, cond, autoregressive(TIMES, 3), noise, commit=commit))
    for result in results:
        assert reached(result.prediction, noise) == {(result.index, 2)}
        assert not result.latents.requires_grad and result.t == 0.6
        assert torch.equal(result.latents, result.prediction.detach())
    gradients = torch.autograd.grad(
        results[2].prediction.sum(), student.parameters(), allow_unused=True
    )
    assert gradients[0] is not None and gradients[1] is None


def test_untapped_steps_keep_no_graph(student, cond):
    """Neither in memory, while they run, nor, with a stepper that carries the state on, in the
    result.
    """
    noise, modes = LeafNoise([3, 4]), []
    record = lambda chunk, t, x_t: modes.append(torch.is_grad_enabled()) or x_t
    results = list(
        run(student, cond, autoregressive(TIMES, 2), noise, stepper="euler", before_step=record)
    )
    assert modes == [False, False, True] * 2
    assert all(
        result.prediction.requires_grad and not reached(result.prediction, noise)
        for result in results
    )


def test_gradient_of_a_chunk_is_that_of_its_last_step_alone(student, cond):
    """The same numbers as one forward by hand, from the recorded state and over recomputed
    context.
    """
    states = {}
    record = lambda chunk, t, x_t: states.update({(chunk, t): x_t}) or x_t
    results = list(run(student, cond, autoregressive(TIMES, 2), before_step=record))
    (gradient,) = torch.autograd.grad(results[1].prediction.square().sum(), student.weight)

    cache = student.new_cache(2, 4, 4)
    with torch.no_grad():
        student.commit(results[0].latents, torch.zeros(2), cond, cache)
    x_t = states[1, 0.6]
    x0 = x0_from_v(x_t, student(x_t, torch.full((2,), 600.0), cond, cache=cache).sample, 0.6)
    assert torch.equal(x0, results[1].prediction)
    assert torch.equal(gradient, torch.autograd.grad(x0.square().sum(), student.weight)[0])


def test_gradient_of_a_joint_forward_reaches_its_states_and_no_older_ones(student, cond):
    """In a rolling window of 3 the finishing chunk is tapped, and depends on the noisier ones
    beside it.
    """
    noise = LeafNoise([3, 4])
    for result in run(student, cond, rolling(TIMES, 4), noise):
        states = {(result.index, 2), (result.index + 1, 1), (result.index + 2, 0)}
        assert reached(result.prediction, noise) == {
            (chunk, event) for chunk, event in states if chunk < 4
        }


def test_tap_on_an_earlier_step_keeps_that_prediction(student, cond):
    events = [Denoise((0,), (1.0,), (0.6,), (True,)), Denoise((0,), (0.6,), (0.0,), (False,))]
    (result,) = run(student, cond, events)
    assert result.prediction.requires_grad and result.t == 1.0
    assert not torch.equal(result.prediction.detach(), result.latents)


def test_untapped_schedules_have_no_gradient(student, cond):
    (result,) = run(student, cond, [Denoise((0,), (1.0,), (0.0,), (False,))])
    assert not result.prediction.requires_grad and torch.equal(result.prediction, result.latents)


def test_taps_are_by_chunk(student, cond):
    """An untapped chunk that finishes in a tapped chunk's forward carries no gradient."""
    event = Denoise((0, 1), (1.0, 1.0), (0.0, 0.0), (True, False))
    assert [r.prediction.requires_grad for r in run(student, cond, [event])] == [True, False]


def test_grad_mode_is_the_consumers_and_is_left_alone(student, cond):
    """``yield`` inside ``no_grad`` would leave the consumer without gradients, and the reverse."""
    results = run(student, cond, autoregressive(TIMES))
    for grad in (True, False, True, False):
        with torch.set_grad_enabled(grad):
            result = next(results)
            assert torch.is_grad_enabled() is grad
        assert result.prediction.requires_grad is grad
        assert torch.is_grad_enabled()


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("stepper", ["renoise", "euler"])
def test_training_and_inference_agree_bitwise(student, cond, schedule, stepper):
    trained = list(run(student, cond, schedule(), stepper=stepper))
    with torch.no_grad():
        streamed = list(run(student, cond, schedule(), stepper=stepper))
    for a, b in zip(trained, streamed, strict=True):
        assert torch.equal(a.prediction, b.prediction) and torch.equal(a.latents, b.latents)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_sample_does_not_depend_on_its_batch(student, cond, schedule):
    batch = list(run(student, cond, schedule(), KeyedNoise([8, 9]), context_t=0.2))
    alone = list(run(student, cond[1:], schedule(), KeyedNoise([9]), context_t=0.2))
    for a, b in zip(batch, alone, strict=True):
        assert torch.equal(a.latents[1:], b.latents)


def test_a_step_puts_the_next_level_of_its_own_noise_on_the_prediction(student, cond):
    """State k is the prediction of step k - 1 with draw k at the time of step k."""
    noise, states, predictions = LeafNoise([3, 4]), {}, {}
    hooks = {
        "before_step": lambda chunk, t, x_t: states.update({(chunk, t): x_t}) or x_t,
        "after_x0": lambda chunk, t, x0: predictions.update({(chunk, t): x0}) or x0,
    }
    with torch.no_grad():
        list(run(student, cond, autoregressive(TIMES, 2), noise, **hooks))
    for chunk in range(2):
        assert torch.equal(states[chunk, TIMES[0]], noise.draws[chunk, 0])
        for event, (before, t) in enumerate(itertools.pairwise(TIMES), start=1):
            expected = (1 - t) * predictions[chunk, before] + t * noise.draws[chunk, event]
            torch.testing.assert_close(states[chunk, t], expected)


def test_truncation_shows_the_predictions_of_the_full_rollout(student, cond):
    """The exit's prediction is that of the same step of the whole rollout, given the same
    context.
    """
    seen = {}
    hook = {"after_x0": lambda chunk, t, x0: seen.update({(chunk, t): x0}) or x0}
    list(run(student, cond, autoregressive(TIMES, 1), **hook))
    for exit_index, t in enumerate(TIMES):
        (result,) = run(student, cond, truncate(autoregressive(TIMES, 1), exit_index))
        assert (
            torch.equal(result.latents, seen[0, t])
            and result.t == t
            and result.nfe == exit_index + 1
        )
        assert result.prediction.requires_grad


def test_endless_schedules_stream_lazily(student, cond):
    """The first chunk is there after its own steps, and the third before anything of the fourth."""
    results = run(student, cond, autoregressive(TIMES))
    assert next(results).index == 0 and len(student.calls) == 3
    assert [r.index for r in itertools.islice(results, 2)] == [1, 2]
    assert [what for *_, what in student.calls] == ["denoise"] * 3 + (
        ["commit"] + ["denoise"] * 3
    ) * 2


@pytest.mark.parametrize("order", SCHEDULES)
@pytest.mark.parametrize("commit_last", [False, True])
@pytest.mark.parametrize("commit", ["clean", "reuse", "none"])
def test_forwards_are_those_that_were_counted(student, cond, order, commit, commit_last):
    commit = "clean" if order == "rolling" and commit == "reuse" else commit  # which is refused
    schedule, options = SCHEDULES[order], {"commit": commit, "commit_last": commit_last}
    cost = cost_of(schedule(), FRAMES, **options)
    results = list(run(student, cond, schedule(), **options))
    kinds = [what for *_, what in student.calls]
    assert (kinds.count("denoise"), kinds.count("commit")) == (cost.nfe, cost.commits)
    assert sum(frames for frames, *_ in student.calls) == cost.latent_frames
    assert [r.nfe for r in results] == ([3, 2, 1] if order == "diagonal" else [3, 3, 3])


@pytest.mark.parametrize("commit", ["clean", "reuse"])
def test_commit_last_lets_a_stream_continue(student, cond, commit):
    """A later rollout over the same cache, from the next chunk on, is the rest of one rollout,
    bitwise.
    """
    cache = student.new_cache(2, 4, 4)
    list(run(student, cond, autoregressive(TIMES, 2), cache=cache, commit=commit, commit_last=True))
    rest = itertools.dropwhile(lambda event: event.chunks[0] < 2, autoregressive(TIMES, 4))
    continued = list(run(student, cond, rest, cache=cache, commit=commit))
    whole = list(run(student, cond, autoregressive(TIMES, 4), commit=commit))
    assert [r.index for r in continued] == [2, 3]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(continued, whole[2:], strict=True))


def test_context_is_clean_noised_or_that_of_the_last_pass(student, cond):
    """Committed keys are those of x0 at 0, of noised x0 at its level, or of the state that was
    denoised.
    """
    noise = KeyedNoise([0, 1])
    where = ((3, FRAMES, 4, 4), torch.device("cpu"), torch.float32)

    def committed(**options):
        cache = student.new_cache(2, 4, 4)
        (result,) = run(
            student,
            cond,
            autoregressive((1.0,), 1),
            noise,
            cache=cache,
            commit_last=True,
            **options,
        )
        return result.latents, cache.frames[0][1], student.calls[-1]

    latents, values, call = committed()
    assert torch.equal(values, latents) and call == (FRAMES, [0.0, 0.0], "commit")
    latents, values, call = committed(context_t=0.25)
    assert torch.equal(values, add_noise(latents, noise.draw(0, CONTEXT_EVENT, *where), 0.25))
    assert call == (FRAMES, [250.0, 250.0], "commit")
    latents, values, call = committed(commit="reuse")
    assert torch.equal(values, noise.draw(0, 0, *where)) and call == (
        FRAMES,
        [1000.0, 1000.0],
        "denoise",
    )


def test_rolling_passes_a_time_a_frame(student, cond):
    list(run(student, cond, rolling((1.0, 0.5), 2)))
    times = [timestep[0] for _, timestep, what in student.calls if what == "denoise"]
    assert times == [1000.0, [500.0, 500.0, 1000.0, 1000.0], 500.0]


def test_hooks_replace_states_and_predictions(student, cond):
    """An image to continue is pinned as the first frame of the first chunk, at every step."""
    image = torch.full((2, 3, 1, 4, 4), 7.0)
    pinned = lambda chunk, t, x: torch.cat([image, x[:, :, 1:]], dim=2) if chunk == 0 else x
    for stepper in ("renoise", "euler"):
        results = list(
            run(student, cond, autoregressive(TIMES, 2), stepper=stepper, after_x0=pinned)
        )
        assert (
            torch.equal(results[0].latents[:, :, :1], image) and not results[1].latents.eq(7).any()
        )
    seen = []
    list(
        run(
            student,
            cond,
            autoregressive(TIMES, 1),
            before_step=lambda i, t, x: seen.append((i, t)) or x,
        )
    )
    assert seen == [(0, t) for t in TIMES]


def test_states_are_float32_whatever_the_student_returns(student, cond):
    student = student.bfloat16()
    results = list(run(student, cond.bfloat16(), autoregressive(TIMES, 2)))
    assert all(r.latents.dtype == torch.float32 for r in results)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stepper": "heun"}, "stepper='heun'"),
        ({"commit": "dirty"}, "commit='dirty'"),
        ({"cache": None}, "needs a cache"),
        ({"context_t": 1.0}, "context_t=1.0"),
        ({"context_t": 0.5, "commit": "reuse"}, "context_t=0.5 is the level of clean commits"),
        ({"noise": KeyedNoise([1])}, "1 noise seeds for 2 prompts"),
    ],
)
def test_contradictions_are_refused_at_construction(student, cond, options, message):
    with pytest.raises(ValueError, match=message):
        run(student, cond, autoregressive(TIMES), **options)


@pytest.mark.parametrize(
    "events, message",
    [
        ([Denoise((i,), (1.0,), (0.0,), (True,)) for i in (0, 2)], r"\(2,\) where \(1,\) follow"),
        ([Denoise((0, 2), (1.0, 1.0), (0.0, 0.5), (True, False))], r"\(0, 2\) where \(0, 1\)"),
        (
            [Denoise((0, 1), (1.0, 1.0), (0.5, 0.0), (False, True))],
            "an older chunk must finish first",
        ),
        (
            [Denoise((0,), (1.0,), (0.5,), (False,)), Denoise((0,), (0.6,), (0.0,), (True,))],
            "is at t=0.5",
        ),
        ([Denoise((0,), (1.0,), (0.5,), (False,))], r"chunks \(0,\) unfinished"),
    ],
)
def test_schedules_that_break_the_order_are_refused(student, cond, events, message):
    with pytest.raises(ValueError, match=message):
        list(run(student, cond, events))


def test_reuse_in_a_rolling_window_is_refused(student, cond):
    with pytest.raises(ValueError, match="commit='clean'"):
        list(run(student, cond, rolling(TIMES, 3), commit="reuse"))
