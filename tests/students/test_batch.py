"""Sessions in a batch: each makes what it makes alone, whoever it is with, up to rounding."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from streamvid.codecs.load import open_codec
from streamvid.codecs.text import PromptEncoder
from streamvid.models.causal_wan import CausalWanTransformer3DModel
from streamvid.models.jump_embedding import add_jump_embedding
from streamvid.rollout.schedule import StreamConfig
from streamvid.students.batch import Batch
from streamvid.students.folder import TINY_TEACHER, Student
from streamvid.students.play import play_script
from streamvid.students.script import MODES
from streamvid.students.session import Session

PROMPTS = (
    "a small red circle moves up quickly",
    "a large blue square moves left slowly",
    "a green triangle falls",
)
SIZE = {"height": 32, "width": 32}
TOLERANCE = 1e-5  # float32; latents are of size 1, frames in [0, 1]
CONFIGS = {
    "sink": StreamConfig(
        num_steps=2, chunk_frames=2, window_frames=6, sink_frames=1, positions="window"
    ),
    "absolute positions": StreamConfig(num_steps=2, chunk_frames=2, window_frames=4),
    "noisy context": StreamConfig(num_steps=2, first_steps=3, chunk_frames=2, context_t=0.1),
    "reuse": StreamConfig(num_steps=2, chunk_frames=2, window_frames=5, commit="reuse"),
    "jumps": StreamConfig(num_steps=2, chunk_frames=1, window_frames=3, stepper="jump"),
}


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 32,
        "num_layers": 2,
        "text_dim": 64,
        "freq_dim": 16,
    }
    networks = [CausalWanTransformer3DModel(**size) for _ in range(2)]
    add_jump_embedding(networks[1])
    for network in networks:
        for name, parameter in network.named_parameters():
            shows = "attn2" in name or "jump" in name  # prompts and targets
            if shows and name.endswith("weight") and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.5)
        network.eval()
    return networks, open_codec(TINY_TEACHER), PromptEncoder.from_pretrained(TINY_TEACHER)


@pytest.fixture
def make_student(parts):
    def make(name):
        config = CONFIGS[name]
        return Student(parts[0][config.stepper == "jump"], config, *parts[1:])

    return make


@pytest.fixture(params=CONFIGS, ids=str)
def student(request, make_student):
    return make_student(request.param)


@pytest.fixture
def batch_sizes(parts):
    """Of the forwards that are made."""
    seen = []
    hooks = [
        network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        for network in parts[0]
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def begin(student, number=0, **options):
    return Session(student, PROMPTS[number % 3], seed=number, **SIZE, **options)


def run(sessions, before_call=None):
    """What comes of the next chunk of each, in a batch."""
    outcomes = {}
    batch = Batch(sessions, before_call)
    while batch:
        outcomes |= dict(batch.step())
    return [outcomes[session] for session in sessions]


def assert_solo(session, chunks):
    """The chunks are those of the session's script, played alone."""
    alone = list(play_script(session.student, session.script))[-len(chunks) :]
    for chunk, other in zip(chunks, alone, strict=True):
        assert (chunk.index, chunk.prompt, chunk.steps) == (other.index, other.prompt, other.steps)
        assert (chunk.latents - other.latents).abs().max() < TOLERANCE
        assert (chunk.frames - other.frames).abs().max() < TOLERANCE


def steer(session, chance):
    """One random change, or none."""
    kind = chance.choice(["prompt", "prompt", "steps", "seed", "none", "none"])
    if kind == "prompt":
        mode = chance.choice(MODES)
        session.switch_prompt(chance.choice(PROMPTS), mode, blend_chunks=chance.choice([2, 3]))
    if kind == "steps":
        session.set_steps(chance.choice([1, 2, 3]))
    if kind == "seed":
        session.set_seed(chance.randrange(100))


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_each_session_is_what_it_is_alone(student, seed):
    """Sessions join, leave, are steered and branched at random: all ages, steps and contexts
    meet.
    """
    chance = random.Random(seed)
    made = {begin(student, 0): [], begin(student, 1): []}
    live = list(made)
    for number in range(2, 8):
        chunks = run(live)
        for session, chunk in zip(live, chunks):
            made[session].append(chunk)
            steer(session, chance)
        if chance.random() < 0.5:
            live.append(begin(student, number))
        if chance.random() < 0.3 and len(live) > 1:
            live.remove(chance.choice(live))
        if chance.random() < 0.3:
            live.append(chance.choice(live).branch())
        made |= {session: [] for session in live if session not in made}
        chance.shuffle(live)
    for session, chunks in made.items():
        if chunks:
            assert_solo(session, chunks)


def test_sessions_of_one_age_take_the_forwards_of_one(student, batch_sizes):
    sessions = [begin(student, number) for number in range(3)]
    for _ in range(3):
        run(sessions)
    assert set(batch_sizes) == {3}
    batch_sizes.clear()
    alone = begin(student)
    for _ in range(3):
        alone.next_chunk()
    num_forwards = len(batch_sizes)
    batch_sizes.clear()
    run(sessions)
    sizes = list(batch_sizes)
    batch_sizes.clear()
    alone.next_chunk()
    assert len(sizes) == len(batch_sizes) <= num_forwards


@pytest.mark.parametrize("name", ["sink", "absolute positions"])
def test_old_and_young_sessions_run_as_one_when_their_windows_are_full(
    make_student, name, batch_sizes
):
    """Under absolute positions each row has its own: a table of the first row's would show."""
    student = make_student(name)
    old, young = begin(student), begin(student, 1)
    for _ in range(5):
        old.next_chunk()
    made = []
    for _ in range(3):
        made.append(young.next_chunk())
    assert old.shape == young.shape
    batch_sizes.clear()
    first, second = zip(*(run([old, young]) for _ in range(2)))
    assert set(batch_sizes) == {2}
    assert_solo(old, first)
    assert_solo(young, [*made, *second])


def test_a_first_chunk_runs_beside_a_steady_one(student, batch_sizes):
    old, new = begin(student), begin(student, 1)
    for _ in range(4):
        old.next_chunk()
    assert old.shape != new.shape
    batch_sizes.clear()
    first, second = zip(*(run([old, new]) for _ in range(2)))
    assert_solo(old, first)
    assert_solo(new, second)


def test_rows_with_fewer_steps_drop_out_of_later_passes(make_student, batch_sizes):
    student = make_student("sink")
    sessions = [begin(student, number, steps=steps) for number, steps in enumerate((1, 3, 4))]
    batch, ends = Batch(sessions), []
    while batch:
        ends += batch.step()
    assert batch_sizes == [3, 2, 2, 1]
    assert [session for session, _ in ends] == sessions  # who has fewer steps is done earlier
    for session, chunk in ends:
        assert_solo(session, [chunk])


def test_two_students_and_two_sizes_do_not_mix(make_student, batch_sizes):
    students = make_student("sink"), make_student("jumps")
    large = Session(students[0], PROMPTS[0], height=32, width=48)
    sessions = [begin(students[0]), begin(students[1]), large]
    outcomes = run(sessions)
    assert set(batch_sizes) == {1}
    assert len({session.shape for session in sessions}) == 3
    for session, chunk in zip(sessions, outcomes):
        assert_solo(session, [chunk])


# ---- who leaves, and who fails -------------------------------------------------------------------


class Gone(Exception):
    """The viewer of a session has left."""


@pytest.mark.parametrize("at", range(4))
def test_a_session_that_is_given_up_in_the_middle_leaves_the_others_alone(make_student, at):
    student = make_student("sink")
    sessions = [begin(student, number) for number in range(3)]
    run(sessions)
    calls = []

    def check(session):
        if session is sessions[1]:
            calls.append(session)
            if len(calls) > at:
                raise Gone

    first, gone, third = run(sessions, check)
    assert isinstance(gone, Gone) and len(calls) == at + 1
    for session, chunk in ((sessions[0], first), (sessions[2], third)):
        assert_solo(session, [chunk, *run([session])])


def test_a_session_that_is_closed_in_the_middle_ends_alone(make_student):
    student = make_student("sink")
    sessions = [begin(student, number) for number in range(2)]
    batch = Batch(sessions)
    batch.step()
    sessions[0].close()
    ends = []
    while batch:
        ends += batch.step()
    outcomes = dict(ends)
    assert type(outcomes[sessions[0]]).__name__ == "SessionClosed"
    assert_solo(sessions[1], [outcomes[sessions[1]]])


def test_numbers_that_are_not_finite_end_one_session(make_student):
    student = make_student("sink")
    sessions = [begin(student, number) for number in range(3)]
    bad = torch.full_like(sessions[1]._state.cond, torch.nan)
    sessions[1]._state = replace(sessions[1]._state, cond=bad)
    first, error, third = run(sessions)
    assert isinstance(error, ValueError) and "not finite" in str(error)
    assert_solo(sessions[0], [first])
    assert_solo(sessions[2], [third])


def test_where_a_joint_pass_fails_each_runs_by_itself(make_student, batch_sizes):
    """As for lack of memory: the sessions go on, then to the bit as alone."""
    student = make_student("sink")
    sessions = [begin(student, number) for number in range(2)]
    twins = [begin(student, number) for number in range(2)]

    def refuse(_, args):
        if len(args[0]) > 1:
            raise MemoryError

    hook = student.transformer.register_forward_pre_hook(refuse)
    chunks = [run(sessions) for _ in range(3)]
    hook.remove()
    for number, twin in enumerate(twins):
        for both in chunks:
            assert torch.equal(both[number].latents, twin.next_chunk().latents)
    assert batch_sizes.count(2) == 3  # tried once per chunk


def test_a_context_that_cannot_be_written_closes_one_session(make_student, monkeypatch):
    student = make_student("sink")
    sessions = [begin(student, number) for number in range(3)]
    before = run(sessions)

    def fail(kv):
        raise MemoryError

    monkeypatch.setattr(sessions[1]._cache, "append", fail)
    first, error, third = run(sessions)
    assert isinstance(error, MemoryError) and sessions[1].closed
    assert_solo(sessions[0], [before[0], first])
    assert_solo(sessions[2], [before[2], third])


def test_a_failed_chunk_can_be_asked_for_again(make_student):
    student = make_student("sink")
    sessions = [begin(student, number) for number in range(2)]
    run(sessions)
    sessions[0].switch_prompt(PROMPTS[2])
    batch = Batch(sessions)
    batch.step()  # the commits
    batch.close()
    outcomes = run(sessions)
    assert outcomes[0].prompt == PROMPTS[2]
    for session, chunk in zip(sessions, outcomes):
        assert_solo(session, [chunk])


def test_what_is_kept_of_a_session_is_not_the_memory_of_the_batch(make_student, tmp_path):
    student = make_student("sink")
    sessions = [begin(student, number) for number in range(3)]
    for _ in range(2):
        run(sessions)
    sessions[0]._commit_pending()
    tensors = [*sessions[0]._cache.state().values(), *sessions[0]._state.decoder]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)
    sessions[0].snapshot(tmp_path / "a.safetensors")
    restored = Session.restore(tmp_path / "a.safetensors", student)
    assert torch.equal(restored.next_chunk().latents, sessions[0].next_chunk().latents)
