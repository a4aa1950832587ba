"""Schedules as data: the orders, their truncation and cost, and the saved configuration."""

import itertools
import json
from dataclasses import replace

import pytest

from streamvid.core.times import step_times
from streamvid.rollout.schedule import (
    Cost,
    Denoise,
    StreamConfig,
    autoregressive,
    build_schedule,
    cost_of,
    full_sequence,
    move_tap,
    rolling,
    table,
    truncate,
)

TIMES = (1.0, 0.9, 0.6)


def rows(schedule):
    """Per chunk, its (t, t_next, tap) in order."""
    chunks = {}
    for event in schedule:
        for chunk, *step in zip(event.chunks, event.t, event.t_next, event.tap):
            chunks.setdefault(chunk, []).append(tuple(step))
    return chunks


FULL_ROW = [(1.0, 0.9, False), (0.9, 0.6, False), (0.6, 0.0, True)]


def test_autoregressive_with_an_enhanced_first_chunk():
    events = list(autoregressive((1.0, 0.5), 2, first_times=TIMES))
    assert [event.chunks for event in events] == [(0,)] * 3 + [(1,)] * 2
    assert rows(events) == {0: FULL_ROW, 1: [(1.0, 0.5, False), (0.5, 0.0, True)]}


def test_table_is_diagonal_and_repeats_its_last_list():
    step_table = [(1, 0.93, 0.73, 0.36), (1, 0.93, 0.36), (1, 0.36)]
    lengths = [len(row) for row in rows(table(step_table, 7)).values()]
    assert lengths == [4, 3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("num_chunks", [1, 2, 5])
def test_rolling_gives_every_chunk_every_step(num_chunks):
    events = list(rolling(TIMES, num_chunks))
    assert rows(events) == {chunk: FULL_ROW for chunk in range(num_chunks)}
    assert len(events) == num_chunks + len(TIMES) - 1
    for event in events:
        # the oldest is cleanest
        assert list(event.t) == sorted(event.t) and len(set(event.t)) == len(event.t)
        assert event.chunks == tuple(range(event.chunks[0], event.chunks[-1] + 1))


def test_rolling_with_a_window_of_one_is_autoregressive():
    assert list(rolling((0.9,), 4)) == list(autoregressive((0.9,), 4))


def test_full_sequence_moves_all_chunks_together():
    events = list(full_sequence((1.0, 0.5), 3))
    assert events[0] == Denoise((0, 1, 2), (1.0,) * 3, (0.5,) * 3, (False,) * 3)
    assert events[1] == Denoise((0, 1, 2), (0.5,) * 3, (0.0,) * 3, (True,) * 3)


@pytest.mark.parametrize("endless, finite", [(autoregressive, autoregressive), (rolling, rolling)])
def test_endless_schedules_are_lazy_and_begin_like_finite_ones(endless, finite):
    begin = list(itertools.islice(endless(TIMES), 12))
    assert begin == list(itertools.islice(finite(TIMES, 100), 12))
    assert len(list(itertools.islice(truncate(endless(TIMES), 1), 12))) == 12


def test_truncation_is_a_prefix_of_every_chunk():
    for order in (autoregressive, rolling, full_sequence):
        assert rows(truncate(order(TIMES, 3), 1)) == {
            i: [FULL_ROW[0], (0.9, 0.0, True)] for i in range(3)
        }
        assert list(truncate(order(TIMES, 3), 2)) == list(order(TIMES, 3))
    assert list(truncate(rolling(TIMES, 4), 1)) == list(rolling(TIMES[:2], 4))


def test_truncation_by_chunk_and_of_ragged_lists():
    schedule = list(autoregressive((1.0, 0.5), 3, first_times=TIMES))
    assert [len(row) for row in rows(truncate(schedule, 2)).values()] == [3, 2, 2]
    assert [
        len(row) for row in rows(truncate(schedule, lambda chunk: (2, 0, 1)[chunk])).values()
    ] == [3, 1, 2]


def test_a_moved_tap_changes_no_step():
    for order in (autoregressive, rolling, full_sequence):
        moved = list(move_tap(order(TIMES, 3), 1))
        assert [replace(event, tap=()) for event in moved] == [
            replace(event, tap=()) for event in order(TIMES, 3)
        ]
        assert all(
            [tap for _, _, tap in row] == [step == 1 for step in range(len(TIMES))]
            for row in rows(moved).values()
        )
        assert list(move_tap(order(TIMES, 3), len(TIMES) - 1)) == list(order(TIMES, 3))
    ragged = rows(move_tap(autoregressive((1.0, 0.5), 2, first_times=TIMES), 2))
    assert [[tap for _, _, tap in row] for row in ragged.values()] == [
        [False, False, True],
        [False, True],
    ]
    assert len(list(itertools.islice(move_tap(autoregressive(TIMES), 1), 12))) == 12


def test_costs_of_the_published_schedules():
    """Self-Forcing's clip has 7 (4 + 1) forwards less the useless last commit, diagonal 17 and no
    commit.
    """
    self_forcing = autoregressive(step_times(4, 5.0), 7)
    assert cost_of(self_forcing, 3) == Cost(nfe=28, commits=6, latent_frames=34 * 3)
    assert cost_of(autoregressive(step_times(4, 5.0), 7), 3, commit_last=True).commits == 7
    diagonal = table([(1, 0.93, 0.73, 0.36), (1, 0.93, 0.36), (1, 0.36)], 7)
    assert cost_of(diagonal, 3, commit="reuse") == Cost(nfe=17, commits=0, latent_frames=17 * 3)
    first_frame = autoregressive((1.0,), 7, first_times=step_times(4, 5.0))
    assert cost_of(first_frame, 3, commit="none").nfe == 10  # ASD's "1*"
    assert cost_of(rolling(TIMES, 4), 3) == Cost(nfe=6, commits=3, latent_frames=(3 * 4 + 3) * 3)
    assert cost_of(full_sequence(TIMES, 4), 3, commit="none") == Cost(3, 0, 36)
    assert cost_of([], 3) == Cost(0, 0, 0)


@pytest.mark.parametrize("times", [(), (1.0, 1.0), (0.5, 0.9), (1.0, 0.0), (1.2, 0.5)])
def test_bad_times_are_refused_at_construction(times):
    for order in (autoregressive, rolling, full_sequence):
        with pytest.raises(ValueError, match="expected at least one, falling"):
            order(times, 2)


def test_bad_counts_are_refused_at_construction():
    for order in (autoregressive, rolling, full_sequence):
        with pytest.raises(ValueError, match="num_chunks=0"):
            order(TIMES, 0)
    with pytest.raises(ValueError, match="step table is empty"):
        table([])
    with pytest.raises(ValueError, match="exit_index=-1"):
        truncate(autoregressive(TIMES), -1)
    with pytest.raises(ValueError, match="exit_index=-1"):
        move_tap(autoregressive(TIMES), -1)


# ---- the configuration ---------------------------------------------------------------------------

CONFIGS = [
    StreamConfig(),
    StreamConfig(
        num_steps=2, first_steps=4, shift=8.0, window_frames=12, sink_frames=3, positions="window"
    ),
    StreamConfig(step_table=((1.0, 0.9), (1.0,)), commit="reuse", chunk_frames=1),
    StreamConfig(stepper="jump"),
    StreamConfig(order="full_sequence", commit="none", stepper="euler", num_steps=50),
    StreamConfig(
        order="rolling", num_steps=5, window_frames=21, sink_frames=3, max_trained_frames=21
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_configuration_survives_json(config):
    assert StreamConfig.from_json(config.to_json()) == config


def test_absent_keys_have_defaults():
    assert StreamConfig.from_json('{"num_steps": 2}') == StreamConfig(num_steps=2)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_step": 4}, "'num_step'.*nearest is 'num_steps'"),
        ({"zzz": 4}, "'zzz'.*nearest is '"),
        ({"num_steps": "4"}, "num_steps='4', expected an integer of at least 1"),
        ({"num_steps": True}, "num_steps=True, expected an integer"),
        ({"num_steps": None}, "num_steps=None"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"window_frames": 2.0}, "window_frames=2.0, expected an integer of at least 1 or null"),
        ({"shift": "5"}, "shift='5', expected a number"),
        ({"shift": 0}, "shift=0"),
        ({"context_t": 1.0}, r"context_t=1.0, expected a noise level in \[0, 1\)"),
        ({"commit": "dirty"}, "commit='dirty', expected one of"),
        ({"commit": ["clean"]}, r"commit=\['clean'\], expected one of"),
        ({"order": "diagonal"}, "order='diagonal'"),
        ({"stepper": "leap"}, "stepper='leap', expected one of .*'jump'"),
        ({"step_table": [1, 0.5]}, "expected a list of lists of times"),
        ({"step_table": [[1, 0.5], []]}, "expected at least one, falling"),
        ({"step_table": [[1]], "first_steps": 4}, "leave first_steps"),
        ({"order": "rolling", "first_steps": 4}, "first_steps=4 needs order='autoregressive'"),
        ({"order": "full_sequence"}, "set commit='none'"),
        ({"order": "rolling", "commit": "reuse"}, "commit='reuse'"),
        ({"context_t": 0.3, "commit": "reuse"}, "context_t=0.3 is the level of clean commits"),
        ({"window_frames": 5, "sink_frames": 3}, "use at least 6"),
        ({"order": "rolling", "window_frames": 9}, "use at least 12"),
        ([1], "a JSON object, not a list"),
    ],
)
def test_bad_configurations_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StreamConfig.from_json(json.dumps(values))


def test_configurations_become_schedules():
    times = step_times(4, 5.0)
    assert list(build_schedule(StreamConfig(), 2)) == list(autoregressive(times, 2))
    assert list(build_schedule(StreamConfig(order="rolling"), 5)) == list(rolling(times, 5))
    config = StreamConfig(num_steps=1, first_steps=4)
    assert list(build_schedule(config, 3)) == list(autoregressive((1.0,), 3, first_times=times))
    config = StreamConfig(step_table=((1, 0.5), (1,)))
    assert list(build_schedule(config, 3)) == list(table([(1, 0.5), (1,)], 3))
    config = StreamConfig(order="full_sequence", commit="none")
    assert list(build_schedule(config, 3)) == list(full_sequence(times, 3))
    with pytest.raises(ValueError, match="give it a length"):
        build_schedule(config)
