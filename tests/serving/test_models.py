"""Several models in one server, and streams that advance as one batch."""

from functools import partial

import pytest
import torch

from streamvid.codecs.load import open_codec
from streamvid.rollout.runner import teacher_runner
from streamvid.rollout.sampler import generate
from streamvid.serving import protocol
from streamvid.serving.clip_jobs import CALLS_PER_TURN, ClipJobs
from streamvid.serving.limits import Limits
from streamvid.serving.live import LiveStreams
from streamvid.serving.metrics import Metrics
from streamvid.serving.models import ServedModel, ServedModels, TeacherClip, name_of, unique_names
from streamvid.serving.recording import Clip, ClipStore
from streamvid.serving.stream import Frames, Stream
from streamvid.serving.worker import Worker
from streamvid.students.batch import run_alone
from streamvid.students.folder import TINY_TEACHER
from streamvid.teachers.load import open_teacher
from tests.serving.conftest import FRAMES, FakeSession, World
from tests.serving.test_http import wait_for


@pytest.fixture
def two():
    """Another student and a teacher, each with a world of its own."""
    worlds = World(), World()
    other, teacher = (partial(FakeSession, world) for world in worlds)
    return worlds, [
        ServedModel("other", other, steps=2),
        ServedModel("teacher", teacher, steps=50, kind="teacher", num_frames=8),
    ]


@pytest.fixture
def client(make_client, two):
    return make_client(name="first", others=two[1])


def test_models_are_listed_as_openai_lists_them(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    first, other, teacher = listed["data"]
    assert [m["id"] for m in listed["data"]] == ["first", "other", "teacher"]
    assert first["created"] > 0
    assert {**first, "created": 0} == {
        "id": "first",
        "object": "model",
        "created": 0,
        "owned_by": "streamvid",
        "kind": "student",
        "live": True,
        "steps": 4,
        "height": 16,
        "width": 16,
        "fps": 100.0,
        "num_frames": None,
    }
    assert (other["kind"], other["live"], other["steps"]) == ("student", True, 2)
    assert (teacher["kind"], teacher["live"], teacher["num_frames"]) == ("teacher", False, 8)
    assert client.get("/v1/models/other").json() == other
    assert client.get("/v1/models/none").status_code == 404
    assert client.get("/v1/info").json()["model"] == "first"


def test_a_stream_is_of_the_model_that_it_names(client, live, two, world):
    with live(client) as viewer:
        viewer.send("session.start", prompt="one", model="other", num_frames=4)
        assert viewer.until("video.start").model == "other"
        viewer.until("session.done")
        assert (len(two[0][0].sessions), len(world.sessions)) == (1, 0)
        viewer.send("session.start", prompt="one", num_frames=4)
        assert viewer.until("video.start").model == "first"
        viewer.until("session.done")
        assert (len(two[0][0].sessions), len(world.sessions)) == (1, 1)


@pytest.mark.parametrize(
    "model, words", [("none", "first, other, teacher"), ("teacher", "makes clips only")]
)
def test_a_stream_of_what_does_not_stream_is_one_error(client, live, model, words):
    with live(client) as viewer:
        viewer.send("session.start", prompt="one", model=model)
        error = viewer.until("error")
        assert error.code == "bad_message" and words in error.message
        viewer.send("session.start", prompt="one")
        viewer.next_frame()


def test_a_clip_is_of_the_model_that_it_names(client, two, world):
    clips = [
        client.post("/v1/videos", json={"prompt": "one", **fields}).json()
        for fields in (
            {"model": "other", "num_frames": 4},
            {"model": "teacher"},
            {"num_frames": 4},
            {"model": "teacher", "seconds": 0.08},
        )
    ]
    clips = [wait_for(client, clip["id"]) for clip in clips]
    assert [clip["model"] for clip in clips] == ["other", "teacher", "first", "teacher"]
    assert [clip["status"] for clip in clips] == ["completed"] * 4
    assert clips[1]["seconds"] == clips[3]["seconds"] == "0.08"  # 8 frames at 100 per second
    assert [len(w.sessions) for w in (*two[0], world)] == [1, 2, 1]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model": "none"}, "first, other, teacher"),
        ({"model": "teacher", "num_frames": 9}, "clips have 8"),
        ({"model": "teacher", "seconds": 1}, "clips have 8"),
        ({"model": "teacher", "steps": 4}, "steps of its own"),
    ],
)
def test_a_clip_that_a_model_does_not_make_is_refused(client, fields, words):
    reply = client.post("/v1/videos", json={"prompt": "one", **fields})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]


def test_a_teachers_clip_is_that_of_the_library():
    """Bit for bit what ``streamvid sample --teacher`` makes, at fewer steps."""
    teacher, codec = open_teacher(TINY_TEACHER), open_codec(TINY_TEACHER)
    runner = teacher_runner("teacher", teacher, 2, 2.0, latent_frames=3)
    prompt, size = "a small red circle moves up", {"height": 32, "width": 32}
    clip = TeacherClip(
        runner, teacher.transformer, codec, teacher.encode_prompt, prompt, seed=7, **size
    )
    frames = run_alone(clip.chunk_passes()).frames
    embedding = teacher.encode_prompt([prompt])
    expected = generate(
        runner.model, codec, embedding, runner.stream, seeds=[7], num_frames=9, **size
    )
    assert torch.equal(frames, expected)
    with pytest.raises(ValueError, match="multiples of 16"):
        TeacherClip(runner, teacher.transformer, codec, None, prompt, seed=0, height=40, width=32)


def test_names_are_those_of_folders_and_unique(tmp_path):
    assert name_of("runs/dmd/student") == name_of(tmp_path / "dmd") == "dmd"
    assert unique_names(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-2", "a-2-2", "a-3"]
    models = [ServedModel("a", FakeSession, steps=1)] * 2
    with pytest.raises(ValueError, match="share an id"):
        ServedModels(models)


def test_a_clip_of_many_passes_leaves_the_worker_to_live_streams_in_between(tmp_path, world):
    model = ServedModel("a", partial(FakeSession, world), steps=50)
    jobs = ClipJobs(ServedModels([model]), ClipStore(tmp_path, 9), Metrics())
    clip = Clip("one", "a", 8, 8, 10.0, "mp4", 0, steps=20, num_frames=FRAMES)
    jobs.add(clip)
    jobs.advance()  # opens it
    forwards = [world.transformer.forwards]
    while clip.status == "in_progress" and len(jobs):
        jobs.advance()
        forwards.append(world.transformer.forwards)
    assert forwards == [0, CALLS_PER_TURN, 2 * CALLS_PER_TURN, 3 * CALLS_PER_TURN, 20]


# ---- batches -------------------------------------------------------------------------------------


@pytest.fixture
def make_stream(world):
    """Streams with sessions; ``plays_s`` is how long the frames that were made still play."""

    def make(plays_s=0.0, work_s=0.1, prompt="one", height=8, begun=True):
        model = ServedModel("a", partial(FakeSession, world), steps=4)
        start = protocol.SessionStart(type="session.start", prompt=prompt)
        stream = Stream(start, height, 8, 10.0, lambda: None, model)
        if begun:
            stream.session = model.open_session(prompt, height=height, width=8)
            stream.pacer.made(0.0, 1000, work_s)
            stream.pacer._plays_until = plays_s
        return stream

    return make


@pytest.fixture
def make_worker(tmp_path):
    def make(streams, batch):
        models = ServedModels([ServedModel("a", FakeSession, steps=4)])
        store = ClipStore(tmp_path, 9)
        worker = Worker(models, Limits(), Metrics(), store, batch)
        worker._live.active.extend(streams)
        return worker

    return make


def chosen(worker, now=0.0):
    turn, _ = worker._choose(now)
    return None if turn is None else turn.streams


def test_streams_that_fall_due_while_a_chunk_is_made_are_made_with_it(make_stream, make_worker):
    """Four streams of 0.1 s per chunk: the lead is 1.5 times 0.4 s. A batch of one takes 0.1 s, one
    of two 0.2 s at most.
    """
    now, soon, later, not_yet = (make_stream(0.6 + due) for due in (0, 0.05, 0.15, 0.35))
    assert chosen(make_worker([not_yet, later, soon, now], batch=4)) == (now, soon, later)


def test_without_a_batch_streams_go_one_by_one(make_stream, make_worker):
    streams = [make_stream(0.1), make_stream(0.1)]
    assert chosen(make_worker(streams, batch=1)) == (streams[0],)


def test_a_batch_holds_the_most_urgent(make_stream, make_worker):
    third, first, second, fourth = (make_stream(s) for s in (0.13, 0.1, 0.12, 0.14))
    assert chosen(make_worker([third, first, second, fourth], batch=3)) == (first, second, third)


def test_what_does_not_fit_stays_out_of_a_batch(make_stream, make_worker):
    first, large, new = make_stream(0.1), make_stream(0.11, height=16), make_stream(begun=False)
    paused, full = make_stream(0.1), make_stream(0.1)
    paused.paused_since = 1.0
    while not full.outbox.is_full:
        full.outbox.put(Frames(torch.zeros(1).numpy(), 0, 0, 0, 0, 0, False))
    worker = make_worker([first, large, paused, full], batch=8)
    assert chosen(worker) == (first,)
    assert chosen(make_worker([first, new], batch=8), now=-0.3) == (new,)
    first.commands.append((protocol.SessionPause(type="session.pause"), 0.0))
    assert chosen(make_worker([make_stream(0.1), first], batch=8)) == (first,)


def test_the_work_of_a_batch_is_shared(make_stream, make_worker):
    """A pacer that took all of it for each stream would begin four times too early."""
    streams = [make_stream() for _ in range(4)]
    live: LiveStreams = make_worker(streams, batch=4)._live
    for stream in streams:
        stream.pacer._work.clear()
    live.advance(streams)
    works = [stream.level.work[-1] for stream in streams]
    assert [stream.pacer.work_s for stream in streams] == [work / 4 for work in works]


def test_of_a_batch_only_who_fails_or_leaves_ends(make_stream, world, tmp_path):
    world.failures["bad"] = RuntimeError("of the model")
    good, bad, gone, other = (make_stream(prompt=p) for p in ("one", "bad", "two", "three"))
    worker = Worker(
        ServedModels([good.model]), Limits(), Metrics(), ClipStore(tmp_path, 9), batch=4
    )
    live: LiveStreams = worker._live
    live.active.extend([good, bad, gone, other])
    sessions = [stream.session for stream in live.active]
    leave = gone.session.chunk_passes

    def leave_in_the_middle():
        for number, call in enumerate(leave()):
            gone.gone = number == 2
            yield call

    gone.session.chunk_passes = leave_in_the_middle
    before = world.transformer.forwards
    live.advance(list(live.active))
    assert live.active == [good, other] and good.chunks == other.chunks == 1
    assert [stream.ended.is_set() for stream in (good, bad, gone, other)] == [
        False,
        True,
        True,
        False,
    ]
    assert [session.closed for session in sessions] == [False, True, True, False]
    assert world.transformer.forwards - before == 3 * 4 + 2  # who has left is asked no more
    with pytest.raises(AssertionError):
        next(sessions[1].chunk_passes())
