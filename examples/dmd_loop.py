"""Distil a few-step streaming student on one page: no trainer, no configuration.

    python examples/dmd_loop.py           # 60 steps, about three minutes on two cores
    python tools/sample.py --student runs/dmd_loop --prompt "a blue ball falls" --out clip.mp4

The teacher denoises a whole clip, in 50 guided steps. The causal start has the teacher's weights,
fitted to make a clip chunk after chunk, each over the keys and values of the chunks before it. In 4
steps per chunk its clips are poor. Distribution matching distillation (DMD, arXiv 2311.18828)
repairs them without a single real video: let the student make a clip x over its own past, exactly
as it will stream (Self-Forcing, arXiv 2506.08009), add noise, and ask two networks what it was:

    x_t = (1 - t) x + t eps
    g   = x0_fake(x_t) - x0_real(x_t)        normalised per clip

    student:      x <- x - g                 leave what only the student makes, towards the teacher
    fake score:   learn to denoise x         so that x0_fake knows the student as it is now

The real score is the frozen teacher, and the fake score begins as its copy. Where the two agree,
the student's clips are distributed like the teacher's, and g is zero.
"""

import sys

import torch

from streamvid.core.fitting import couple, flow_matching_loss
from streamvid.core.inject import dmd_gradient, surrogate
from streamvid.core.process import add_noise, x0_from_v
from streamvid.core.times import sample_times
from streamvid.data.prompts import world_prompts
from streamvid.evaluation.runs import held_out_prompts, make_clips, score_clips
from streamvid.evaluation.world_score import mean_scores
from streamvid.rollout.loop import rollout
from streamvid.rollout.noise import KeyedNoise
from streamvid.rollout.runner import student_runner
from streamvid.rollout.sampler import new_cache
from streamvid.rollout.schedule import build_schedule, truncate
from streamvid.students.folder import TINY_START, TINY_TEACHER, load_student, save_student
from streamvid.teachers.base import predict_guided, score_velocity
from streamvid.teachers.wan import WanTeacher

BATCH, NUM_CHUNKS, LATENT_SHAPE = 8, 3, (16, 8, 8)  # 3 chunks of 3 latent frames: 33 frames
GUIDANCE, SHIFT, FAKE_UPDATES = 2.0, 8.0, 2


def roll_out(student, cond, stream):
    """A clip [B, C, T, h, w] that the student makes over its own past.

    Each chunk ends at one and the same random step of its four; only that step carries gradient.
    """
    last_step = int(torch.randint(stream.num_steps, ()))
    chunks = rollout(
        student,
        cond,
        truncate(build_schedule(stream, NUM_CHUNKS), last_step),
        KeyedNoise(torch.randint(2**31, (len(cond),)).tolist()),
        latent_shape=LATENT_SHAPE,
        chunk_frames=stream.chunk_frames,
        cache=new_cache(student, stream, len(cond), LATENT_SHAPE),
    )
    return torch.cat([chunk.prediction for chunk in chunks], dim=2)


def noised(x):
    """The clip with noise, that noise, and its level; mostly high, where motion is decided."""
    eps = torch.randn_like(x)
    t = sample_times(len(x), "uniform", SHIFT, torch.default_generator, low=0.02, high=0.98)
    return add_noise(x, eps, t), eps, t


def fake_score_loss(fake_score, x, cond):
    """Flow matching on what the student makes."""
    x_t, eps, t = noised(x)
    return flow_matching_loss(score_velocity(fake_score, x_t, t, cond), x, eps)


def student_loss(teacher, fake_score, x, cond):
    """A number whose gradient at x is the difference of the two scores."""
    with torch.no_grad():
        x_t, _, t = noised(x)
        x0_fake = x0_from_v(x_t, score_velocity(fake_score, x_t, t, cond), t)
        x0_real = x0_from_v(x_t, predict_guided(teacher, x_t, t, cond, GUIDANCE), t)
    return surrogate(x, dmd_gradient(x, x0_fake, x0_real))


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def world_score(transformer, student, num_prompts):
    """Colours, shapes, motion and physics, read from the pixels; prompts no training has seen."""
    prompts = held_out_prompts(num_prompts)
    runner = student_runner("scoring", transformer, student.stream)
    cond = student.prompts.encode(prompts)
    clips = make_clips(runner, student.codec, cond, range(num_prompts), num_frames=33)
    return mean_scores(score_clips(clips, prompts))["overall"]


def distil(num_steps=60, out="runs/dmd_loop", num_scored=32):
    """Distil the shipped start into ``out``; returns what was printed."""
    torch.manual_seed(0)
    teacher = WanTeacher.from_pretrained(TINY_TEACHER)
    fake_score = teacher.trainable_copy()
    start = load_student(TINY_START)
    student = start.transformer
    average = load_student(TINY_START).transformer  # of the student's weights, steadier than they
    embeddings = start.prompts.encode(world_prompts(500))
    student_adam = torch.optim.Adam(student.parameters(), lr=1.5e-4, betas=(0.0, 0.99))
    fake_adam = torch.optim.Adam(fake_score.parameters(), lr=5e-4, betas=(0.0, 0.99))

    numbers = {"before": world_score(average, start, num_scored)}
    print(f"world score before: {numbers['before']:.3f}")
    for step in range(1, num_steps + 1):
        for _ in range(FAKE_UPDATES):
            cond = embeddings[torch.randint(len(embeddings), (BATCH,))]
            with torch.no_grad():
                x = roll_out(student, cond, start.stream)
            numbers["fake_score"] = update(fake_adam, fake_score_loss(fake_score, x, cond))
        x = roll_out(student, cond, start.stream)
        loss = student_loss(teacher, fake_score, x, cond)
        numbers["student"] = update(student_adam, loss)
        couple(average.parameters(), student.parameters(), keep=0.95)
        if step % 10 == 0:
            losses = f"student {numbers['student']:.4f}, fake score {numbers['fake_score']:.3f}"
            print(f"step {step}: {losses}", flush=True)
    save_student(out, average, start.stream)
    numbers["after"] = world_score(average, start, num_scored)
    print(f"world score after: {numbers['after']:.3f}; the student is in {out}")
    return numbers


if __name__ == "__main__":
    distil(*map(int, sys.argv[1:2]))
