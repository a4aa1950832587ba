"""When chunks are due, who gets how many frames, and how figures are counted."""

import pytest

from streamvid.serving.limits import TokenBucket
from streamvid.serving.pacing import FlowControl, Pacer, ServiceLevel


def test_the_first_chunk_is_due_at_once_and_the_next_just_before_it_is_needed():
    pacer = Pacer(fps=10)
    assert pacer.due(100.0) == 100.0
    assert pacer.made(101.0, num_frames=10, work_s=0.2) == 0.0
    assert pacer.due(101.0) == pytest.approx(102.0 - 1.5 * 0.2)  # plays until 102


def test_streams_that_share_the_worker_begin_earlier():
    pacer = Pacer(fps=10)
    pacer.made(0.0, 10, 0.2)
    assert pacer.due(0.0, streams=3) < pacer.due(0.0, streams=1)


def test_chunks_made_early_queue_up_and_late_ones_say_how_late():
    pacer = Pacer(fps=10)
    pacer.made(0.0, 10, 0.1)
    assert pacer.made(0.5, 10, 0.1) == 0.0  # plays until 2.0
    assert pacer.made(2.25, 10, 0.1) == pytest.approx(0.25)
    assert pacer.due(2.25) == pytest.approx(3.25 - 0.15)  # the clock moved with the wait


def test_a_held_stream_is_not_late():
    pacer = Pacer(fps=10)
    pacer.made(0.0, 10, 0.1)
    pacer.restart()
    assert pacer.due(50.0) == 50.0
    assert pacer.made(50.0, 10, 0.1) == 0.0


def test_the_further_a_viewer_is_behind_the_fewer_frames_it_gets():
    flow = FlowControl(fps=16, acks=True)
    flow.acknowledge(0, 0.0)  # never sent
    strides = []
    for sent in range(0, 200, 14):
        flow.sent = sent - 1
        strides.append(flow.stride(chunk_frames=12))
    assert strides[:2] == [1, 1] and strides[-1] == 8 and strides == sorted(strides)
    assert flow.must_wait(12)
    flow.acknowledge(flow.sent, 1.0)
    assert flow.stride(12) == 1 and not flow.must_wait(12) and flow.heard == 1.0


@pytest.mark.parametrize("sequence", [-1, 11, 2**32 - 1])
def test_an_acknowledgement_of_what_was_not_sent_counts_for_nothing(sequence):
    flow = FlowControl(fps=16, acks=True, sent=10, shown=0)
    flow.acknowledge(sequence, 1.0)
    assert flow.shown == 0


def test_an_old_acknowledgement_does_not_go_back():
    flow = FlowControl(fps=16, acks=True, sent=10, shown=8)
    flow.acknowledge(4, 1.0)
    assert flow.shown == 8


def test_without_acknowledgements_every_frame_is_sent():
    flow = FlowControl(fps=16, acks=False, sent=10_000)
    assert flow.stride(12) == 1 and not flow.must_wait(12)


def test_figures_of_a_stream():
    level = ServiceLevel(asked=10.0)
    level.add(10.5, num_frames=8, work_s=0.25, late_s=0.0)
    level.add(11.0, num_frames=12, work_s=0.25, late_s=0.1)
    assert (level.first_s, level.deadlines_met, level.stall_s) == (0.5, 0.5, 0.1)
    assert list(level.intervals) == [0.5] and level.frames_per_second == 40.0
    level.interrupt()
    level.add(99.0, 12, 0.25, 0.0)
    assert list(level.intervals) == [0.5]


def test_a_bucket_refills_evenly():
    now = 0.0
    bucket = TokenBucket(per_minute=6, clock=lambda: now)
    assert [bucket.take() for _ in range(8)] == [True] * 6 + [False] * 2
    now = 10.0  # one more
    assert [bucket.take() for _ in range(2)] == [True, False]
    now = 10_000.0  # never more than at the start
    assert [bucket.take() for _ in range(7)].count(True) == 6
