"""Live streams over a WebSocket, with a student that needs no model."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from streamvid.serving import protocol
from streamvid.serving.stream import Frames, Outbox

FRAMES = 4


def eventually(condition):
    """Wait until something holds that another thread brings about."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came about")


def colour(frame):
    return protocol.decode_picture(frame[1]).reshape(-1, 3).mean(axis=0).round().astype(int)


def test_a_stream_from_start_to_stop(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", seed=9, steps=2)
        start = viewer.until("video.start")
        assert (start.height, start.width, start.seed, start.steps) == (16, 16, 9, 2)
        frames = [viewer.next_frame() for _ in range(12)]
        viewer.send("session.stop")
        done = viewer.until("session.done")
    headers = [header for header, _ in frames]
    assert [h.sequence for h in headers] == list(range(12))
    assert [h.chunk for h in headers] == [0] * 4 + [1] * 4 + [2] * 4
    assert [h.flags & protocol.FIRST_OF_CHUNK for h in headers] == [1, 0, 0, 0] * 3
    assert np.abs(colour(frames[0]) - (live.red_of("one"), 0, 9)).max() <= 4
    assert done.reason == "stopped" and done.stopped and done.frames == 4 * done.chunks
    assert all(session.closed for session in world.sessions)


def test_a_new_prompt_is_seen_and_announced_before_its_first_frame(make_client, live):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()
        viewer.send("session.prompt_update", prompt="two", mode="hard")
        applied = viewer.until("prompt.applied")
        assert (applied.prompt_id, applied.prompt, applied.mode) == (1, "two", "hard")
        frame = viewer.next_frame()
    assert frame[0].sequence == applied.sequence and frame[0].prompt_id == 1
    assert frame[0].flags == protocol.FIRST_OF_CHUNK | protocol.FIRST_OF_PROMPT
    before = [f for f in viewer.frames if f[0].sequence < applied.sequence]
    assert all(abs(colour(f)[0] - live.red_of("one")) <= 4 for f in before)
    assert abs(colour(frame)[0] - live.red_of("two")) <= 4


def test_of_two_prompts_within_one_chunk_the_last_one_counts(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()
        world.transformer.entered.clear()
        world.transformer.go_on.clear()
        assert world.transformer.entered.wait(60)  # in the middle of a chunk
        viewer.send("session.prompt_update", prompt="two")
        viewer.send("session.prompt_update", prompt="three")
        worker = viewer.worker
        eventually(lambda: len(worker._live.active[0].commands) == 2)
        world.transformer.go_on.set()
        applied = viewer.until("prompt.applied")
    assert (applied.prompt, applied.prompt_id) == ("three", 2)
    assert len(viewer.of_type("prompt.applied")) == 1


def test_a_refused_change_leaves_the_stream_as_it_was(make_client, live):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()
        viewer.send("session.prompt_update", prompt="refused")
        error = viewer.until("error")
        assert (error.code, error.message) == ("bad_request", "this prompt can't be")
        assert abs(colour(viewer.next_frame())[0] - live.red_of("one")) <= 4


def test_a_paused_stream_makes_nothing_and_goes_on_where_it_was(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()
        viewer.send("session.pause")
        viewer.until("session.paused")
        forwards, index = world.transformer.forwards, world.sessions[0].index
        viewer.send("script.get")  # answered while it is paused
        viewer.until("script")
        assert (world.transformer.forwards, world.sessions[0].index) == (forwards, index)
        viewer.send("session.resume")
        viewer.until("session.resumed")
        assert viewer.next_frame()[0].chunk == index
    assert [h.sequence for h, _ in viewer.frames] == list(range(len(viewer.frames)))


def test_settings_take_effect_and_are_confirmed(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("session.update", steps=1, seed=5, fps=200)
        said = viewer.until("settings.applied")
        assert (said.steps, said.seed, said.fps, said.hold_rate) == (1, 5, 200.0, False)
        assert viewer.until("video.chunk").steps == 1
        viewer.send("session.update", hold_rate=True)
        assert viewer.until("settings.applied").hold_rate
        assert world.sessions[0].held == 200.0


def test_start_over_begins_with_chunk_0(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.until("video.chunk", chunk=2)
        viewer.send("session.reset", seed=77)
        said = viewer.until("session.restarted")
        assert (said.seed, said.prompt, said.chunk) == (77, "one", 0)
        chunk = viewer.until("video.chunk")
        assert (chunk.chunk, chunk.seed) == (0, 77)
    assert world.sessions[0].closed


def test_a_bookmark_is_a_moment_to_return_to(make_client, live):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", seed=3)
        viewer.until("video.chunk", chunk=1)
        viewer.send("session.bookmark")
        mark = viewer.until("bookmark.made")
        viewer.send("session.prompt_update", prompt="two")
        viewer.until("prompt.applied")
        for _ in range(2):  # the bookmark stays
            viewer.send("session.branch", bookmark=mark.bookmark)
            said = viewer.until("session.restarted")
            assert (said.bookmark, said.chunk, said.prompt) == (mark.bookmark, mark.chunk, "one")
            chunk = viewer.until("video.chunk")
            assert chunk.chunk == mark.chunk
            frame = viewer.next_frame()
            assert frame[0].sequence == chunk.sequence
            assert abs(colour(frame)[0] - live.red_of("one")) <= 4
        viewer.send("session.branch", bookmark=99)
        assert viewer.until("error").code == "bad_request"


def test_old_bookmarks_make_room_and_are_closed(make_client, live, world):
    with live(make_client(limits={"bookmarks": 2})) as viewer:
        viewer.send("session.start", prompt="one")
        for number in range(4):
            viewer.send("session.bookmark")
            assert viewer.until("bookmark.made").bookmark == number
        viewer.send("session.branch", bookmark=0)
        assert viewer.until("error").code == "bad_request"
        assert [session.closed for session in world.sessions[1:]] == [True, True, False, False]


def test_a_stream_ends_with_the_chunk_that_has_its_last_frame(make_client, live):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", num_frames=10)
        done = viewer.until("session.done")
        assert (done.reason, done.frames, done.chunks) == ("finished", 12, 3)
        viewer.send("session.start", prompt="two", num_frames=1)  # on the same connection
        assert viewer.until("session.done").frames == 4
    assert len(viewer.frames) == 16


# ---------------------------------------------------------------- viewers that do not behave


def test_a_viewer_that_confirms_nothing_gets_fewer_frames_and_then_none(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one", acks=True)
        worker = viewer.worker
        eventually(lambda: worker._live.active and worker._live.active[0].flow.must_wait(FRAMES))
        stream = worker._live.active[0]
        eventually(lambda: len(stream.outbox) == 0)
        made = world.sessions[0].index
        assert stream.dropped > 0
        viewer.send("script.get")  # commands are still heard
        viewer.until("script")
        assert world.sessions[0].index == made  # nothing is made for nobody
        last = viewer.frames[-1][0].sequence
        gaps = np.diff([h.sequence for h, _ in viewer.frames])
        assert set(gaps[:4]) == {1} and gaps.max() > 1
        viewer.send("ack", sequence=last)
        viewer.next_frame()


def frames_of(number):
    images = np.zeros((FRAMES, 8, 8, 3), np.uint8)
    return Frames(images, FRAMES * number, number, 0, 0, 0, False)


def test_an_outbox_holds_two_chunks_and_all_messages_in_order():
    woken = []
    outbox = Outbox(lambda: woken.append(1))
    dropped = [outbox.put(frames_of(0)), outbox.put(protocol.SessionPaused())]
    dropped += [outbox.put(frames_of(number)) for number in (1, 2, 3)]
    assert dropped == [0, 0, 0, FRAMES, FRAMES] and len(woken) == 5
    items = [outbox.take() for _ in range(4)]
    assert isinstance(items[0], protocol.SessionPaused)
    assert [item.chunk for item in items[1:3]] == [2, 3] and items[3] is None


def test_a_viewer_that_leaves_in_the_middle_of_a_chunk_is_noticed_at_the_next_step(
    make_client, live, world
):
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one", steps=8)
        viewer.next_frame()
        world.transformer.entered.clear()
        world.transformer.go_on.clear()
        assert world.transformer.entered.wait(60)
        forwards, session = world.transformer.forwards, weakref.ref(world.sessions.pop())
        worker = viewer.worker
        stream = worker._live.active[0]
    eventually(lambda: stream.gone)
    world.transformer.go_on.set()
    eventually(lambda: stream.ended.is_set())
    assert world.transformer.forwards - forwards <= 1  # of the eight steps of the chunk
    assert stream.session is None and not worker._live.active
    eventually(lambda: (gc.collect(), session() is None)[1])


def test_many_viewers_that_come_and_go_leave_nothing(make_client, live, world):
    client = make_client()
    worker = client.app.state.worker
    for _ in range(30):
        with live(client) as viewer:
            viewer.send("session.start", prompt="one")
            viewer.next_frame()
    eventually(lambda: not worker._live.active and not worker._waiting)
    assert all(session.closed for session in world.sessions)
    assert len(world.sessions) == 30
    eventually(lambda: threading.active_count() < 30)


def test_messages_that_cannot_be_read_are_told_and_then_end_the_connection(make_client, live):
    with live(make_client()) as viewer:
        for _ in range(5):
            viewer.socket.send_text("{")
        with pytest.raises(live.Closed, match="1003"):
            while True:
                viewer.receive()
    assert [m.code for m in viewer.messages] == ["bad_message"] * 5


def test_bytes_and_long_messages_are_refused(make_client, live):
    with live(make_client()) as viewer:
        viewer.socket.send_bytes(b"\x00\xff")
        assert viewer.until("error").code == "bad_message"
        viewer.socket.send_text("x" * 20_000)
        assert viewer.until("error").code == "too_large"
        with pytest.raises(live.Closed):
            viewer.receive()


def test_the_servers_own_limits(make_client, live):
    with live(make_client(limits={"prompt_chars": 5, "max_fps": 500.0})) as viewer:
        beyond = [{"prompt": "a long one"}, {"steps": 9}, {"fps": 501}, {"width": 640}]
        for fields in beyond:
            viewer.send("session.start", **{"prompt": "a", **fields})
            assert viewer.until("error").code == "bad_message"


def test_what_needs_a_stream_says_so(make_client, live):
    with live(make_client()) as viewer:
        viewer.send("session.pause")
        assert viewer.until("error").code == "no_session"
        viewer.send("session.start", prompt="one")
        viewer.until("video.start")
        viewer.send("session.start", prompt="two")
        assert viewer.until("error").code == "bad_state"


def test_too_many_messages_are_refused_but_acknowledgements_are_not(make_client, live):
    with live(make_client(limits={"messages_per_minute": 5})) as viewer:
        viewer.send("session.start", prompt="one")
        for _ in range(50):
            viewer.send("ack", sequence=0)
        for _ in range(5):
            viewer.send("script.get")
        assert viewer.until("error").code == "too_many"
        assert len(viewer.of_type("script")) <= 4


# ---------------------------------------------------------------- several viewers


def test_one_place_and_a_queue(make_client, live):
    client = make_client(limits={"sessions": 1, "waiting": 1})
    with live(client) as first:
        first.send("session.start", prompt="one")
        first.next_frame()
        with live(client) as second:
            second.send("session.start", prompt="two")
            assert second.until("session.queued").position == 1
            with live(client) as third:
                third.send("session.start", prompt="three")
                error = third.until("error")
                assert error.code == "busy" and error.retryable
                with pytest.raises(live.Closed, match="1013"):
                    third.receive()
            first.send("session.stop")
            first.until("session.done")
            assert second.until("video.start").prompt == "two"


def test_who_leaves_the_queue_moves_the_others_up(make_client, live):
    client = make_client(limits={"sessions": 1})
    with live(client) as first, live(client) as third:
        first.send("session.start", prompt="one")
        first.next_frame()
        with live(client) as second:
            second.send("session.start", prompt="two")
            second.until("session.queued", position=1)
            third.send("session.start", prompt="three")
            third.until("session.queued", position=2)
            second.send("session.stop")
            assert second.until("session.done").chunks == 0
            assert third.until("session.queued").position == 1


def test_streams_of_one_address_are_limited_and_counted_down(make_client, live):
    client = make_client(limits={"sessions_per_address": 1})
    with live(client) as first, live(client) as second:
        first.send("session.start", prompt="one")
        first.next_frame()
        second.send("session.start", prompt="two")
        assert second.until("error").code == "busy"
        first.send("session.stop")
        first.until("session.done")
        eventually(lambda: started(second))


def started(viewer):
    viewer.send("session.start", prompt="two")
    while not isinstance(message := viewer.receive(), protocol.VideoStart):
        if isinstance(message, protocol.Error):
            return False
    return True


@pytest.mark.parametrize(
    "failure, code",
    [
        (RuntimeError("secret of the code"), "internal"),
        (MemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("can't allocate memory"), "out_of_memory"),
        (ValueError("the text encoder gave numbers that are not finite"), "bad_request"),
    ],
)
@pytest.mark.parametrize("prompt", ["bad chunk", "bad open"])
def test_an_error_ends_one_stream_and_the_others_live_on(
    make_client, live, world, failure, code, prompt
):
    world.failures[prompt] = failure
    client = make_client()
    with live(client) as good, live(client) as bad:
        good.send("session.start", prompt="one")
        good.next_frame()
        bad.send("session.start", prompt=prompt)
        error = bad.until("error")
        assert error.code == code and "secret" not in error.message
        assert bad.until("session.done").reason == "error"
        last = good.frames[-1][0].sequence
        while good.next_frame()[0].sequence < last + 12:
            pass
        bad.send("session.start", prompt="two")  # the same connection may try again
        bad.next_frame()
    assert client.get("/healthz").status_code == 200


def test_a_stream_nobody_watches_ends(make_client, live):
    with live(make_client(limits={"idle_seconds": 0.0})) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("session.pause")
        assert viewer.until("session.done").reason == "idle"


def test_a_stream_has_a_longest_life(make_client, live):
    with live(make_client(limits={"session_seconds": 0.05})) as viewer:
        viewer.send("session.start", prompt="one")
        assert viewer.until("session.done").reason == "time_limit"


def test_stopping_the_server_ends_streams_and_finishes_recordings(make_client, live):
    client = make_client()
    worker = client.app.state.worker
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.send("record.start")
        viewer.until("record.started")
        viewer.next_frame()
        threading.Thread(target=worker.stop).start()
        assert viewer.until("session.done").reason == "server_stopping"
        recorded = viewer.of_type("record.done")[0]
        assert client.get("/readyz").status_code == 503
        assert client.get(recorded.url).status_code == 200
        viewer.send("session.start", prompt="two")
        assert viewer.until("error").code == "busy"


def test_the_whole_state_of_a_connection_is_gone_after_it(make_client, live):
    client = make_client()
    with live(client) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.next_frame()
        stream = weakref.ref(viewer.worker._live.active[0])
    eventually(lambda: (gc.collect(), stream() is None)[1])
