"""Context in training is made as it is made in a stream: by the same passes, from the same states,
at the same times.

A chunk once became context from its random exit, so that with reused keys a quarter of the first
chunk's were those of pure noise, where a stream writes all of them at the last time of its list.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from streamvid.methods import afd, asd, diagonal, dmd

from streamvid.rollout.sampler import generate_latents
from streamvid.rollout.schedule import StreamConfig, cost_of
from streamvid.seeding import key_to_seed
from tests.fakes import Ar1Student, ScoreOf, ar1_teacher, noise, prompt_batch

CHUNKS, KEYS = 3, [3, 4]
TABLE = ((1.0, 0.95, 0.8, 0.47), (1.0, 0.95, 0.47), (1.0, 0.47))
STREAMS = {
    "clean": StreamConfig(num_steps=4, chunk_frames=1),
    "noised": StreamConfig(num_steps=4, chunk_frames=1, context_t=0.2),
    "reused": StreamConfig(num_steps=4, chunk_frames=1, commit="reuse"),
    "euler": StreamConfig(num_steps=3, chunk_frames=1, stepper="euler"),
    "first steps": StreamConfig(num_steps=2, first_steps=4, chunk_frames=1),
    "table": StreamConfig(step_table=TABLE, chunk_frames=1),
    "table, reused": StreamConfig(step_table=TABLE, chunk_frames=1, commit="reuse"),
}


class Writes(Ar1Student):
    """Keeps what is written to its context: (the chunk's number, time, state), whichever way it is
    written.
    """

    def __init__(self):
        super().__init__(a=0.4, b=0.7, s=1.1)
        self.written = []

    def forward(self, hidden_states, timestep, encoder_hidden_states, cache, return_kv=False):
        output = super().forward(hidden_states, timestep, encoder_hidden_states, cache)
        output.kv = torch.cat(
            [timestep.reshape(1, -1), hidden_states.flatten()[None]], dim=1
        ).detach()
        return output

    def commit(self, latents, timestep, encoder_hidden_states, cache):
        self.written.append((len(cache), timestep[0].item(), latents.clone()))
        super().commit(latents, timestep, encoder_hidden_states, cache)

    def new_cache(self, batch_size, height, width, **policy):
        self.written.clear()
        return _Cache(self.written)


class _Cache(list):
    def __init__(self, written):
        super().__init__()
        self.written = written

    def append(self, entry):
        if entry.ndim == 2:  # keys and values of a denoising pass
            time, state = entry[0, 0].item(), entry[:, len(KEYS) :]
            self.written.append((len(self), time, state.clone()))
            entry = state.reshape(len(KEYS), 1, 1, 1, 1)
        super().append(entry)


def streamed_context(student, stream, seeds, cond):
    with torch.no_grad():
        generate_latents(
            student, cond, stream, seeds=seeds, latent_shape=(1, 1, 1), num_chunks=CHUNKS
        )
    return list(student.written)


def assert_same(context, streamed):
    assert len(streamed) == CHUNKS - 1
    assert [entry[:2] for entry in context] == [entry[:2] for entry in streamed]
    for (_, _, state), (_, _, expected) in zip(context, streamed):
        assert torch.equal(state, expected)


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("module", [dmd, diagonal])
def test_matching_writes_the_context_of_a_stream_at_every_exit(module, stream):
    student, teacher = Writes(), ar1_teacher(0.8, CHUNKS)
    method = module.Method(
        module.Config(num_chunks=CHUNKS, guidance_scale=1.0),
        student,
        teacher,
        stream,
        (1, 1, 1),
        ScoreOf(teacher),
    )
    batch = prompt_batch(teacher, KEYS)
    streamed = streamed_context(
        student, stream, [key_to_seed(0, "student", key) for key in KEYS], batch["cond"]
    )
    exits = set()
    for step in range(12):
        for turn in method.networks():
            exits.add(method.decide(turn, step).exit_index)
            method.loss(turn, batch, step)
            assert_same(student.written, streamed)
    assert exits == set(range(method.num_steps))


@pytest.mark.parametrize("first_steps", [None, 4])
def test_asd_writes_the_context_of_a_stream_of_n_steps(first_steps):
    student, teacher = Writes(), ar1_teacher(0.8, CHUNKS)
    stream = StreamConfig(num_steps=4, chunk_frames=1, first_steps=first_steps)
    config = asd.Config(num_chunks=CHUNKS, guidance_scale=1.0, asd_weight=0.0)
    method = asd.ASD(
        config, student, teacher, stream, (1, 1, 1), ScoreOf(teacher), torch.nn.Linear(1, 1)
    )
    batch, seeds = prompt_batch(teacher, KEYS), [key_to_seed(0, "student", key) for key in KEYS]
    drawn = Counter()
    for step in range(40):
        n = method.decide("student", step).num_steps
        drawn[n] += 1
        method.loss("student", batch, step)
        written = list(student.written)
        assert_same(
            written, streamed_context(student, replace(stream, num_steps=n), seeds, batch["cond"])
        )
    assert set(drawn) == {1, 2, 3, 4}


def test_a_gan_on_own_clips_writes_the_context_of_a_stream():
    student, stream = Writes(), STREAMS["reused"]
    method = afd.AFD(afd.Config(policy="gan"), student, stream, torch.nn.Linear(1, 1))
    cond = torch.zeros(len(KEYS), 1, 1)
    streamed = streamed_context(student, stream, KEYS, cond)
    batch = {"latents": noise(len(KEYS), 1, CHUNKS, 1, 1), "cond": cond, "keys": KEYS}
    for seed in range(8):
        method._roll_out(student, batch, KEYS, torch.Generator().manual_seed(seed))
        assert_same(student.written, streamed)


def test_the_context_of_the_exit_costs_fewer_forwards_and_is_not_that_of_a_stream():
    student, teacher = Writes(), ar1_teacher(0.8, CHUNKS)
    stream = STREAMS["reused"]
    of = {}
    for context in ("streamed", "exit"):
        config = dmd.Config(num_chunks=CHUNKS, guidance_scale=1.0, context=context)
        of[context] = dmd.DMD(config, student, teacher, stream, (1, 1, 1), ScoreOf(teacher))
    step = next(step for step in range(50) if of["exit"].decide("student", step).exit_index == 0)
    decision = of["exit"].decide("student", step)
    forwards = {
        name: cost_of(method._schedule(stream, decision, CHUNKS), 1, "reuse").nfe
        for name, method in of.items()
    }
    assert forwards == {"streamed": 4 + 4 + 1, "exit": 3}
    of["exit"].loss("student", prompt_batch(teacher, KEYS), step)
    assert [time for _, time, _ in student.written] == [1000.0, 1000.0]
