"""Every objective on the world: the same causal start, the same clips, the same number of updates.

Each objective trains the tiny causal student for some updates and its student is then streamed as
the objective says, in its own number of steps and from step to step in its own way. What it is
compared with is the start, streamed in the same way. Finished runs are JSON files in a folder; what
has one is not run again.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamvid import reports
from streamvid.evaluation.runs import held_out_prompts, score_by_seed
from streamvid.experiment.build import build_trainer
from streamvid.experiment.config import RunConfig, load_run
from streamvid.experiment.estimate import estimate
from streamvid.objectives import all_objectives
from streamvid.objectives.base import Distillation, Objective, ScoreMatching
from streamvid.rollout.runner import student_runner
from streamvid.settings.targets import TARGETS
from streamvid.settings.video import NOT_ON_CLIPS
from streamvid.students.folder import Student, load_student
from streamvid.studies.jobs import read_result, result_file, write_result
from streamvid.training.sharding import find_networks
from streamvid.training.trainer import TrainingError

NUM_FRAMES = 33
SHIFT = 8.0
GUIDANCE = 2.0
NETWORKS = ("fake_score", "discriminator")
RATE = 5e-4  # of the networks beside the student
ATTRIBUTES = ("colour", "shape", "direction", "speed", "physics", "overall")
SPREAD = 0.01
"""Of a score of this many prompts, one seed of the noise: what is less is no change."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "asd": ("options.discriminator_updates_per_cycle=1", "options.r1_weight=10"),
    "afd": ("options.advantage_clip=1", "train.optimizers.student.lr=2e-4"),
    "gndm": ("rollout.group_size=2",),
    "diagonal": ("stream.num_steps=4",),
}
"""What an objective is given besides its defaults."""


@dataclass(frozen=True)
class Job:
    """An objective and a seed."""

    name: str
    seed: int
    updates: int
    num_prompts: int
    run_file: Path
    folder: Path
    """Of the results; clips and pairs are kept there, too."""

    @property
    def kind(self) -> type[Objective]:
        return all_objectives()[self.name]

    @property
    def result_file(self) -> Path:
        return result_file(self.folder, self.name, self.updates, self.seed)

    @property
    def run_name(self) -> str:
        return f"{self.name}-{self.updates}-{self.seed}"


def video_objectives() -> dict[str, type[Objective]]:
    """Those that distil clips, by name."""
    return {
        name: kind
        for name, kind in all_objectives().items()
        if kind.role != "start" and not kind().needs & NOT_ON_CLIPS.keys()
    }


def configure(job: Job) -> RunConfig:
    """The run of a job: the run file with what the objective asks for."""
    kind = job.kind
    objective = kind()
    overrides = [
        f"objective={job.name}",
        f"train.name={job.run_name}",
        f"train.output_dir={job.folder / 'runs'}",
        f"train.seed={job.seed}",
        f"stream.num_steps={kind.num_steps}",
        f"stream.stepper={kind.sampler}",
    ]
    cycle = 1
    if issubclass(kind, Distillation):
        overrides += [f"options.shift={SHIFT}", f"options.guidance_scale={GUIDANCE}"]
    if isinstance(objective, ScoreMatching):
        cycle = objective.fake_updates_per_student
    if "pairs" in objective.needs:
        overrides += ["data.kind=trajectories", f"data.path={job.folder / 'trajectories'}"]
    else:
        overrides.append(f"data.path={job.folder / 'clips.safetensors'}")
    trained = [name for name in objective.networks() if name in NETWORKS]
    overrides += [f"train.optimizers.{name}.lr={RATE}" for name in trained]
    overrides += [f"train.optimizers.{name}.betas=[0.0, 0.99]" for name in trained]
    overrides += [f"train.max_steps={job.updates * cycle}", *OPTIONS.get(job.name, ())]
    return load_run(job.run_file, overrides)


def run_job(job: Job) -> str:
    """Train and score, unless it is done; a line about it."""
    if job.result_file.exists():
        return f"{job.name}: done before"
    torch.set_num_threads(1)
    try:
        result = train(job) | {"scores": score(job, load_student(student_of(job)))}
    except (ValueError, TrainingError) as error:
        result = {"error": " ".join(str(error).split())}
    result |= {"objective": job.name, "seed": job.seed, "updates": job.updates}
    write_result(job.result_file, result)
    if "error" in result:
        return f"{job.name}: {result['error']}"
    return f"{job.name}: {result['scores']['overall']:.3f} in {result['seconds']:.0f} s"


def student_of(job: Job) -> Path:
    """The folder of the student that a job trains."""
    return job.folder / "runs" / job.run_name / "student"


def train(job: Job) -> dict[str, Any]:
    """What a training takes: seconds of one core, and forwards, memory and operations per update
    of the student.
    """
    config = configure(job)
    need = estimate(config, steps=4)
    steps = config.train.max_steps / job.updates
    trainer = build_trainer(config, progress=False)
    forwards: Counter[str] = Counter()
    for name, network in find_networks(trainer.method).items():
        count_calls(network, name, forwards)
    began = time.process_time()
    trainer.train()
    return {
        "seconds": time.process_time() - began,
        "forwards": {name: count / job.updates for name, count in forwards.items()},
        "tflop": need.flops * steps / 1e12,
        "peak_bytes": need.peak_bytes,
        "networks": len(trainer.method.networks()),
        "num_steps": config.stream.num_steps,
        "stepper": config.stream.stepper,
    }


def count_calls(network: nn.Module, name: str, calls: Counter[str]) -> None:
    """Count a network's forwards under its name."""

    def count(*_: Any) -> None:
        calls[name] += 1

    network.register_forward_pre_hook(count)


def score(job: Job, student: Student) -> dict[str, float]:
    """The world score by attribute, on prompts that no training has."""
    prompts = held_out_prompts(job.num_prompts)
    runner = student_runner(job.name, student.transformer, student.stream)
    cond = student.prompts.encode(prompts)
    (scores,) = score_by_seed(runner, student.codec, cond, prompts, [0], NUM_FRAMES)
    return scores


def score_start(jobs: Sequence[Job], start: Path) -> dict[str, dict[str, float]]:
    """The start streamed in every way that an objective streams its student, by ``way_of``."""
    found: dict[str, dict[str, float]] = {}
    student = load_student(start)
    for job in jobs:
        config = configure(job)
        key = way_of(config.stream.num_steps, config.stream.stepper)
        file = result_file(job.folder, "start", key)
        if key not in found and not file.exists():
            write_result(file, score(job, replace(student, stream=config.stream)))
        found[key] = read_result(file)
    return found


def way_of(num_steps: int, stepper: str) -> str:
    """How a student is streamed; one that is not told where to land jumps by Euler steps."""
    return f"{num_steps}-{'renoise' if stepper == 'renoise' else 'euler'}"


# ---- the report ----------------------------------------------------------------------------------


def read_plane(file: Path) -> dict[str, dict[str, float]]:
    """By objective and target, how far its points are from the teacher's in the plane, over the
    sampling floor: of a report of `streamvid toy2d`, the mean over seeds.
    """
    if not file.exists():
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    for row in read_result(file)["rows"]:
        ratios = found.setdefault(row["objective"], {}).setdefault(row["target"], [])
        ratios.append(row["ratio"])
    return {
        name: {target: statistics.mean(ratios) for target, ratios in of_targets.items()}
        for name, of_targets in found.items()
    }


def write_report(
    path: Path,
    jobs: Sequence[Job],
    start: dict[str, dict[str, float]],
    plane: dict[str, dict[str, float]],
    longer: Sequence[Job] = (),
) -> str:
    """The table of all finished jobs, as JSON, and as Markdown beside it; returns the text.

    Args:
        start: of ``score_start``.
        plane: of ``read_plane``.
        longer: jobs with more updates, in a table of their own.
    """
    results = finished(jobs)
    more = finished(longer)
    complete = [job.name for job in jobs if job.kind.role == "complete"]
    count = count_complete(improved(results, start))
    head = (
        f"Every objective from the same causal start on the world: {jobs[0].updates} updates of"
        f" the student, batches of 4 clips, one seed; {jobs[0].num_prompts} held-out prompts, one"
        " seed of the noise, so that scores differ by about"
        f" {SPREAD} by chance. Each student is streamed in the steps, and from step to step in the"
        " way, that its objective is published for; the start beside it is streamed in the same"
        f" way. {count} of {len(complete)} complete objectives improve the start{not_run_of(jobs)}"
        f"{say_longer(results, more, start)}{not_run_of(longer)}."
        " Seconds are one core's for the whole training; forwards and TFLOP are per update of the"
        " student; memory is the peak of a step on an accelerator, by the dry run. The"
        " steps are few, so this"
        " says what trains, not what is best. Ring, moons and prompts are targets in the plane:"
        " the energy distance to the teacher's points over its sampling floor, 1 is as near as two"
        " sets of the teacher's own (toy2d.md).\n\n"
    )
    text = head + table(results, start, plane)
    if more:
        text += f"\nWith {longer[0].updates} updates:\n\n" + table(more, start, plane)
    content = {"rows": results, "longer": more, "start": start}
    reports.write_report(path, text, content, reports.environment())
    return text


def finished(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The results that there are."""
    return [read_result(job.result_file) for job in jobs if job.result_file.exists()]


def not_run_of(jobs: Sequence[Job]) -> str:
    """Which of the jobs have no result, for a sentence; empty if all have one."""
    missing = [job.name for job in jobs if not job.result_file.exists()]
    return f" (not run: {', '.join(missing)})" if missing else ""


def improved(results: Sequence[dict[str, Any]], start: dict[str, dict[str, float]]) -> set[str]:
    """The objectives whose students score above the start by more than ``SPREAD``."""
    done = [result for result in results if "scores" in result]
    return {result["objective"] for result in done if gain_of(result, start) > SPREAD}


def count_complete(names: set[str]) -> int:
    """How many of them are complete objectives, not baselines."""
    return sum(all_objectives()[name].role == "complete" for name in names)


def say_longer(
    results: Sequence[dict[str, Any]],
    more: Sequence[dict[str, Any]],
    start: dict[str, dict[str, float]],
) -> str:
    """What more updates change, for the sentence that counts."""
    if not more:
        return ""
    count = count_complete(improved([*results, *more], start))
    left = sorted({r["objective"] for r in more} - improved(more, start))
    names = f", all but {', '.join(left)}" if left else ""
    return (
        f"; the others were given {more[0]['updates']} updates (the second table), with which"
        f" {count} do{names}"
    )


def gain_of(result: dict[str, Any], start: dict[str, dict[str, float]]) -> float:
    """What the overall score of a student is above that of the start."""
    before = start[way_of(result["num_steps"], result["stepper"])]["overall"]
    return result["scores"]["overall"] - before


def table(
    results: Sequence[dict[str, Any]],
    start: dict[str, dict[str, float]],
    plane: dict[str, dict[str, float]],
) -> str:
    """A Markdown row per objective."""
    known = all_objectives()
    shown = [name for name in ATTRIBUTES if any(name in r.get("scores", {}) for r in results)]
    lines = [
        ["objective", "paper", "role", "steps", "start", "after", "gain", *shown[:-1]]
        + ["networks", "forwards", "TFLOP", "GiB", "seconds", *TARGETS]
    ]
    for result in results:
        kind = known[result["objective"]]
        row = [kind.name, kind.paper, kind.role]
        ratios = [plane.get(kind.name, {}).get(target) for target in TARGETS]
        in_plane = ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
        if "error" in result:
            missing = len(lines[0]) - len(row) - len(in_plane) - 1
            lines.append([*row, result["error"], *[""] * missing, *in_plane])
            continue
        way = way_of(result["num_steps"], result["stepper"])
        scores = result["scores"]
        row += [f"{result['num_steps']} {result['stepper']}", f"{start[way]['overall']:.3f}"]
        row += [f"{scores['overall']:.3f}", f"{gain_of(result, start):+.3f}"]
        row += [f"{scores[name]:.2f}" for name in shown[:-1]]
        row += [str(result["networks"]), f"{sum(result['forwards'].values()):.0f}"]
        row += [f"{result['tflop']:.2f}", f"{result['peak_bytes'] / 2**30:.2f}"]
        lines.append([*row, f"{result['seconds']:.0f}", *in_plane])
    return reports.markdown(lines)


def remove_checkpoints(jobs: Sequence[Job]) -> None:
    """Give up the checkpoints of finished jobs, which would be some gigabytes."""
    for job in jobs:
        if job.result_file.exists():
            with suppress(OSError):
                shutil.rmtree(job.folder / "runs" / job.run_name / "checkpoints")
