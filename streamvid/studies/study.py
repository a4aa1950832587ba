"""Studies: many short trainings and their evaluation, unattended, each finished one kept at once.

A study file names *variants*: a run file with overrides, how many seeds, and the ways in which its
student is then streamed. All start from the same networks and are scored on the same held-out
prompts with the same noise. A variant without a run file is a student that is there already.
Results are JSON files in a folder; what has one is not run again, and a training that was
interrupted goes on from its last checkpoint, so a study may take several days.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamvid.codecs.base import latent_frames_of
from streamvid.codecs.load import open_codec
from streamvid.config import load_config
from streamvid.data.latents import WorldSet, world_clips
from streamvid.data.world import render, sample_spec
from streamvid.evaluation import runs
from streamvid.evaluation.judge import win_rate
from streamvid.evaluation.world_score import mean_scores
from streamvid.experiment.build import build_trainer
from streamvid.experiment.config import load_run
from streamvid.reports import machine, mean_and_spread
from streamvid.rollout.runner import Runner, student_runner, teacher_runner
from streamvid.rollout.sampler import generate_latents
from streamvid.rollout.schedule import StreamConfig, build_schedule, cost_of
from streamvid.students.folder import TINY_TEACHER, Student, load_student
from streamvid.studies.jobs import result_file, write_result
from streamvid.teachers.wan import WanTeacher, load_wan_transformer
from streamvid.training.metrics import read_metrics
from streamvid.training.trainer import TrainingError

EVALUATION_MINUTES = 1.5  # of one way of streaming on 100 prompts, on one thread
TEACHER = "teacher"
TRUTH = "true clips"
JUDGE_SEED = 900_000  # of the first clip that a judge sees; no training takes it


@dataclass
class Variant:
    """One row of trainings."""

    run: str | None = None
    """Its run file, relative to the study file; null evaluates ``student`` as it is."""
    student: str | None = None
    """A student folder, where there is nothing to train."""
    after: str | None = None
    """A variant whose student, of the same seed, this training starts from; null leaves it to the
    run file."""
    overrides: tuple[str, ...] = ()
    """``key=value`` settings that replace the run file's."""
    seeds: int = 1
    """Training seeds, from 0; of a student that is there already, seeds of the noise."""
    deploy: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Ways to stream the student: a label, and fields of ``stream_config.json`` that differ, "none"
    for null. {} is as it was trained."""
    long: tuple[str, ...] = ()
    """Labels of ``deploy`` that are also streamed for many times the clip length, scored by
    windows."""
    noise_seeds: int = 1
    """Seeds of the noise that each trained student's scores are means over; one scores 100 prompts
    to about 0.01."""
    judge: int = 0
    """Pairs of true clips and its own, for a discriminator that no training has seen; 0 asks
    none."""
    curves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Lines of the picture, and which labels of ``deploy`` are on each; [] is all of them."""
    minutes: float = 0.0
    """Minutes that its training takes, as measured, for the forecast of a study's time."""


@dataclass
class StudyConfig:
    """A study."""

    variants: dict[str, Variant] = field(default_factory=dict)
    about: str = ""
    """The first lines of its report."""
    prompts: int = 100
    """Held-out prompts for every score."""
    num_frames: int = 33
    """Pixel frames of a clip."""
    long_times: int = 10
    """Windows of a long stream, each of ``num_frames`` - 1 frames."""
    long_prompts: int = 16
    guidance_scale: float = 2.0
    """Guidance of the teacher, which is sampled with 50 Euler steps."""
    minutes_per_run: float = 10.0
    """The most that a training takes."""
    max_steps: int | None = None
    """Optimiser steps of every training; null leaves it to the run files."""
    max_seeds: int | None = None
    """The most seeds of a variant; null leaves it to the variants."""

    def __post_init__(self) -> None:
        if self.max_seeds is not None and self.max_seeds < 1:
            raise ValueError(f"max_seeds={self.max_seeds}, expected at least 1, or null")
        for name, variant in self.variants.items():
            if (variant.run is None) == (variant.student is None):
                raise ValueError(
                    f"variants.{name}: give either run, a run file, or student, a folder"
                )
            if not variant.deploy:
                variant.deploy = {name: {}}
            self._check_after(name, variant)
            for key, labels in {
                "long": variant.long,
                **{f"curves.{line}": of for line, of in variant.curves.items()},
            }.items():
                for label in labels:
                    if label not in variant.deploy:
                        known = ", ".join(variant.deploy)
                        raise ValueError(
                            f"variants.{name}.{key} has {label!r}, expected labels of deploy:"
                            f" {known}"
                        )

    def _check_after(self, name: str, variant: Variant) -> None:
        first = self.variants.get(variant.after) if variant.after is not None else None
        if variant.after is None or (
            variant.run
            and first
            and first.run
            and first.after is None
            and first.seeds >= variant.seeds
            and first is not variant
        ):
            return
        raise ValueError(
            f"variants.{name}.after={variant.after!r}, expected another variant that is trained,"
            f" from its own run file's start and with at least {variant.seeds} seeds, and a run of"
            " this one"
        )


@dataclass(frozen=True)
class Job:
    """A variant and a seed."""

    name: str
    seed: int
    variant: Variant
    study: StudyConfig
    home: Path
    """The folder of the study file."""
    folder: Path
    """The folder of the results."""

    @property
    def result_file(self) -> Path:
        return result_file(self.folder, self.name, self.seed)

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / f"{self.name}-{self.seed}"

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that its numbers rest on; they are kept with a result, and compared before
        that is used again.
        """
        of_study = {
            name: getattr(self.study, name)
            for name in ("prompts", "num_frames", "guidance_scale", "max_steps")
        }
        own = {
            "run": self.variant.run,
            "student": self.variant.student,
            "after": self.variant.after,
        }
        return {**own, "overrides": list(self.variant.overrides), **of_study}


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read and check a study file; every run file is read too, so that a wrong one is found before
    the first training.

    Raises:
        ValueError: one line that names the variant.
    """
    study = load_config(StudyConfig, path, list(overrides))
    if not study.variants:
        raise ValueError(f"{path}: a study needs variants")
    for job in jobs_of(study, Path(path).parent, Path("runs/study")):
        try:
            if job.variant.run is not None:
                _run_config(job)
        except ValueError as error:
            raise ValueError(f"variants.{job.name}: {error}") from error
    return study


def jobs_of(study: StudyConfig, home: Path, folder: Path) -> list[Job]:
    """All runs of a study: first seeds first, so that a study that is stopped early has something
    of everything.
    """
    pairs = [
        (seed, name)
        for name, variant in study.variants.items()
        for seed in range(variant.seeds)[: study.max_seeds]
    ]
    order = {name: index for index, name in enumerate(study.variants)}
    pairs.sort(key=lambda pair: (pair[0], order[pair[1]]))
    return [Job(name, seed, study.variants[name], study, home, folder) for seed, name in pairs]


def _run_config(job: Job) -> Any:
    overrides = [
        *job.variant.overrides,
        f"train.name={job.run_dir.name}",
        f"train.output_dir={job.run_dir.parent}",
        f"train.seed={job.seed}",
        f"train.max_minutes={job.study.minutes_per_run:g}",
    ]
    if job.variant.after is not None:
        overrides.append(f"student.path={replace(job, name=job.variant.after).run_dir / 'student'}")
    if job.study.max_steps is not None:
        overrides.append(f"train.max_steps={job.study.max_steps}")
    assert job.variant.run is not None
    return load_run(job.home / job.variant.run, overrides)


# ---- one run -------------------------------------------------------------------------------------


def _run_variant(job: Job) -> str:
    """Train and evaluate; a line about it. Where there is a result already, train only, if the
    student is not there.
    """
    began = time.perf_counter()
    try:
        result = {
            "variant": job.name,
            "seed": job.seed,
            "recipe": job.recipe,
            "machine": machine(),
            **_train(job),
        }
        if job.result_file.exists():
            return f"{job.name}, seed {job.seed}: scored before"
        result["rows"] = evaluate(job, result.pop("path"))
    except (ValueError, OSError, TrainingError) as error:
        return f"{job.name}, seed {job.seed}: error: {' '.join(str(error).split())}"
    write_result(job.result_file, result)
    scores = ", ".join(f"{row['label']} {row['scores']['overall']:.3f}" for row in result["rows"])
    return f"{job.name}, seed {job.seed}: {scores} ({(time.perf_counter() - began) / 60:.0f} min)"


def _train(job: Job) -> dict[str, Any]:
    """The student's folder, and what its training has to tell."""
    if job.variant.run is None:
        assert job.variant.student is not None
        return {
            "path": str(job.home / job.variant.student),
            "steps": 0,
            "train_s": 0.0,
            "metrics": {},
        }
    config = _run_config(job)
    if not (job.run_dir / "student").is_dir():
        build_trainer(config, progress=False).train()
    metrics = read_metrics(job.run_dir / "metrics.jsonl")
    return {
        "path": str(job.run_dir / "student"),
        "steps": int(metrics[-1]["step"]),
        "train_s": metrics[-1]["seconds"],
        "metrics": tail_means(metrics),
    }


def tail_means(metrics: Sequence[dict[str, float]], share: float = 0.25) -> dict[str, float]:
    """The mean of each number over the last part of a training, where the line has it."""
    tail = metrics[int(len(metrics) * (1 - share)) :]
    values = {
        name: [line[name] for line in tail if line.get(name) is not None]
        for line in tail
        for name in line
    }
    return {
        name: statistics.mean(each)
        for name, each in values.items()
        if each and name not in ("step", "seconds", "samples")
    }


def evaluate(job: Job, path: str) -> list[dict[str, Any]]:
    """A row for each way to stream the student."""
    study, student = job.study, load_student(path)
    prompts = runs.held_out_prompts(study.prompts)
    cond = student.prompts.encode(prompts)
    noise_seeds = range(job.variant.noise_seeds) if job.variant.run is not None else [job.seed]
    rows = []
    for label, fields in job.variant.deploy.items():
        changed: dict[str, Any] = {
            name: None if value == "none" else value for name, value in fields.items()
        }
        stream = replace(student.stream, **changed)
        runner = student_runner(label, student.transformer, stream)
        by_seed = runs.score_by_seed(
            runner, student.codec, cond, prompts, noise_seeds, study.num_frames
        )
        row = {
            "label": label,
            "scores": mean_and_spread(by_seed)[0],
            **cost_row(stream, study.num_frames, student.codec.temporal_ratio),
        }
        if label in job.variant.long:
            row["long"] = long_row(runner, student.codec, cond, prompts, study)
        if job.variant.judge:
            row["judge"] = judge(runner, student, job.variant.judge, study.num_frames)
        rows.append(row)
    return rows


def judge(runner: Runner, student: Student, num: int, num_frames: int) -> dict[str, float]:
    """How often clips of unseen prompts are taken for true ones, see ``evaluation.judge``."""
    frames, prompts = zip(
        *world_clips(WorldSet(num_clips=num, num_frames=num_frames, first_seed=JUDGE_SEED))
    )
    true = torch.cat(
        [student.codec.encode_frames(torch.stack(frames[i : i + 16])) for i in range(0, num, 16)]
    )
    cond = student.prompts.encode([names[0] for names in prompts])
    shape, seeds = (true.shape[1], *true.shape[3:]), runs.evaluation_keys(0, num)
    made = [
        generate_latents(
            runner.model,
            cond[i : i + 16],
            runner.stream,
            seeds=seeds[i : i + 16],
            latent_shape=shape,
            num_chunks=true.shape[2] // runner.stream.chunk_frames,
        )
        for i in range(0, num, 16)
    ]
    return win_rate(load_wan_transformer(TINY_TEACHER), true, torch.cat(made), cond, num_steps=num)


def cost_row(
    stream: StreamConfig, num_frames: int, temporal_ratio: int, passes: int = 1
) -> dict[str, int]:
    """Forwards of a clip, commits among them apart, and the latent frames that they push
    through.
    """
    chunks = latent_frames_of(num_frames, temporal_ratio) // stream.chunk_frames
    cost = cost_of(build_schedule(stream, chunks), stream.chunk_frames, stream.commit)
    return {"nfe": cost.nfe * passes, "commits": cost.commits, "work": cost.latent_frames * passes}


def long_row(
    runner: Runner, codec: Any, cond: Tensor, prompts: Sequence[str], study: StudyConfig
) -> dict[str, Any]:
    """Scores, brightness and contrast of long streams, window by window."""
    num = min(study.long_prompts, len(prompts))
    window = study.num_frames - 1
    clips = runs.make_long_clips(runner, codec, cond[:num], study.long_times, window)
    windows = runs.score_windows(clips, prompts[:num], window)
    return {
        "num_frames": clips.shape[1],
        "overall": [each["overall"] for each in windows],
        **appearance(clips, window),
    }


def appearance(clips: Tensor, window: int) -> dict[str, list[float]]:
    """Brightness (mean) and contrast (standard deviation over pixels) of clips ``[B, T, 3, H, W]``
    by windows of frames.
    """
    parts = [part for part in clips.split(window, dim=1) if part.shape[1] == window]
    return {
        "brightness": [part.mean().item() for part in parts],
        "contrast": [part.flatten(2).std(dim=2).mean().item() for part in parts],
    }


# ---- what runs are compared with -----------------------------------------------------------------


def _run_reference(job: Job) -> str:
    """The teacher in 50 guided steps and the true clips, on the same prompts; a line about it."""
    study, file = job.study, job.result_file
    if file.exists():
        return f"{job.name}: done before"
    prompts = runs.held_out_prompts(study.prompts)
    codec, teacher = open_codec(TINY_TEACHER), WanTeacher.from_pretrained(TINY_TEACHER)
    frames = latent_frames_of(study.num_frames, codec.temporal_ratio)
    runner = teacher_runner("teacher, 50 steps", teacher, 50, study.guidance_scale, frames)
    (scores,) = runs.score_by_seed(
        runner, codec, teacher.encode_prompt(prompts), prompts, [0], study.num_frames
    )
    rows: list[dict[str, Any]] = [
        {
            "label": runner.label,
            "scores": scores,
            **cost_row(runner.stream, study.num_frames, codec.temporal_ratio, 2),
        }
    ]
    truth = runs.score_clips(
        runs.reconstructed_clips(codec, study.prompts, study.num_frames), prompts
    )
    rows.append({"label": TRUTH, "scores": mean_scores(truth), "long": measure_true_clips(study)})
    about = {"variant": job.name, "seed": 0, "recipe": job.recipe, "machine": machine()}
    write_result(file, {**about, "steps": 0, "train_s": 0.0, "metrics": {}, "rows": rows})
    return f"{job.name}: {scores['overall']:.3f}, {TRUTH} {rows[1]['scores']['overall']:.3f}"


def measure_true_clips(study: StudyConfig) -> dict[str, list[float]]:
    """Brightness and contrast of true clips as long as the long streams."""
    window = study.num_frames - 1
    seeds = range(runs.HELD_OUT_SEED, runs.HELD_OUT_SEED + study.long_prompts)
    clips = torch.stack(
        [render(sample_spec(seed, held_out=True), window * study.long_times) for seed in seeds]
    )
    return appearance(clips, window)


def run_job(job: Job) -> str:
    """A job of either kind."""
    return _run_reference(job) if job.name == TEACHER else _run_variant(job)


def find_unfinished(
    wanted: Sequence[Job], jobs: Sequence[Job], kept: Set[str] = frozenset()
) -> list[Job]:
    """Those of ``wanted`` that have no result, and those of all ``jobs`` whose students they start
    from and which are not there.

    Args:
        kept: variants that count as done.
    """
    left = {
        (job.name, job.seed)
        for job in wanted
        if not job.result_file.exists() and job.name not in kept
    }
    first = {(job.variant.after, job.seed) for job in wanted if (job.name, job.seed) in left}
    missing = {
        (job.name, job.seed)
        for job in jobs
        if (job.name, job.seed) in first and not (job.run_dir / "student").is_dir()
    }
    return [job for job in jobs if (job.name, job.seed) in left | missing]


def forecast(jobs: Sequence[Job], num_at_once: int) -> tuple[float, float]:
    """The hours that the jobs should take by what has been measured, and the most that their limits
    allow.
    """
    expected = most = 0.0
    for job in jobs:
        ways = len(job.variant.deploy) + 2 * len(job.variant.long) + 2 * bool(job.variant.judge)
        evaluation = ways * EVALUATION_MINUTES * job.study.prompts / 100
        limit = job.study.minutes_per_run if job.variant.run is not None else 0.0
        expected += evaluation + min(job.variant.minutes or limit, limit)
        most += evaluation + limit
    return expected / 60 / num_at_once, most / 60 / num_at_once


def all_jobs(study: StudyConfig, home: Path, folder: Path) -> list[Job]:
    """The reference, and all runs."""
    return [
        Job(TEACHER, 0, Variant(student="-"), study, home, folder),
        *jobs_of(study, home, folder),
    ]
