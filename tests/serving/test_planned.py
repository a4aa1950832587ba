"""Changes that name the chunk they take effect with, and automatic bookmarks."""

import pytest

ENOUGH = 40  # chunks that a stream has at hand while a message is on its way


def chunks_until(viewer, chunk):
    """The announcements of all chunks up to this one, in order."""
    viewer.until("video.chunk", chunk=chunk)
    return viewer.of_type("video.chunk")


def hold(viewer, world):
    """Pause a stream; returns the number of its next chunk."""
    viewer.send("session.pause")
    viewer.until("session.paused")
    return world.sessions[0].index


def resume(viewer):
    viewer.send("session.resume")
    viewer.until("session.resumed")


def test_changes_take_effect_with_the_chunk_that_they_name(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        first = hold(viewer, world)
        switch, other, seed = first + 4, first + 2, 77
        viewer.send("session.prompt_update", prompt="two", at=switch)  # in any order
        viewer.send("session.update", steps=1, at=other)
        viewer.send("session.update", seed=seed, at=switch)
        resume(viewer)
        chunks = chunks_until(viewer, switch + 1)
        assert [chunk.steps for chunk in chunks] == [4] * other + [1] * (len(chunks) - other)
        assert [chunk.prompt_id for chunk in chunks] == [0] * switch + [1, 1]
        assert [chunk.seed for chunk in chunks] == [0] * switch + [seed, seed]
        applied = viewer.of_type("settings.applied")
        assert [said.chunk for said in applied] == [other, switch]
        assert viewer.of_type("prompt.applied")[0].chunk == switch


def test_a_chunk_that_is_made_can_not_be_named(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        viewer.until("video.chunk", chunk=1)
        first = hold(viewer, world)
        viewer.send("session.prompt_update", prompt="two", at=first - 1)
        viewer.send("script.get")  # it has been read when this is answered
        viewer.until("script")
        (error,) = viewer.of_type("error")
        assert (error.code, error.message) == (
            "bad_request",
            f"at={first - 1}, expected {first} or later: the chunks before it are made",
        )
        viewer.send("session.prompt_update", prompt="three", at=first)  # the next one can
        resume(viewer)
        assert viewer.until("prompt.applied").chunk == first


def test_what_a_viewer_asks_for_now_wins_over_what_was_planned(make_client, live, world):
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        first = hold(viewer, world)
        viewer.send("session.update", seed=5, at=first + 1)
        resume(viewer)
        viewer.until("settings.applied", seed=5)
        viewer.send("session.update", seed=6)
        viewer.until("settings.applied", seed=6)
        assert world.sessions[0].seed == 6


def test_plans_have_an_end_and_a_restart_forgets_them(make_client, live, world):
    with live(make_client(limits={"commands": 3})) as viewer:
        viewer.send("session.start", prompt="one")
        first = hold(viewer, world)
        for number in range(4):
            viewer.send("session.update", seed=number, at=first + ENOUGH)
            viewer.send("script.get")  # it has been read when this is answered
            viewer.until("script")
        assert "wait for their chunks" in viewer.of_type("error")[0].message
        assert len(viewer.of_type("error")) == 1
        viewer.send("session.reset")
        viewer.until("session.restarted")
        chunks = chunks_until(viewer, first + ENOUGH)
        assert chunks[-1].seed == 0


@pytest.mark.parametrize("order", [("bookmark", "prompt_update"), ("prompt_update", "bookmark")])
def test_a_planned_bookmark_is_the_moment_before_the_changes(make_client, live, world, order):
    fields = {"bookmark": {"automatic": True}, "prompt_update": {"prompt": "two"}}
    with live(make_client()) as viewer:
        viewer.send("session.start", prompt="one")
        chunk = hold(viewer, world) + 2
        for verb in order:
            viewer.send(f"session.{verb}", at=chunk, **fields[verb])
        resume(viewer)
        made = viewer.until("bookmark.made")
        assert (made.chunk, made.automatic, made.kept) == (chunk, True, [0])
        assert viewer.until("prompt.applied").chunk == chunk
        viewer.send("session.branch", bookmark=made.bookmark)
        said = viewer.until("session.restarted")
        assert (said.chunk, said.prompt) == (chunk, "one")


def test_automatic_bookmarks_make_room_first(make_client, live):
    with live(make_client(limits={"bookmarks": 3})) as viewer:
        viewer.send("session.start", prompt="one")
        for automatic in (False, True, True, True, False, False):
            viewer.send("session.bookmark", automatic=automatic)
            made = viewer.until("bookmark.made")
        assert made.kept == [0, 4, 5]
        viewer.send("session.bookmark")
        assert viewer.until("bookmark.made").kept == [4, 5, 6]
