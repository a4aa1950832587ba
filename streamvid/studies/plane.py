"""Distil one target with one objective: a run of some seconds, a function of its seed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamvid.core.fitting import couple, flow_matching_loss
from streamvid.core.process import add_noise, euler_step, renoise_step
from streamvid.core.times import euler_times
from streamvid.files import atomic_file
from streamvid.objectives import all_objectives
from streamvid.objectives.base import Distillation, Objective, parts_of
from streamvid.settings.plane import Laboratory, PlaneStep, PointNet
from streamvid.settings.targets import COVERAGE, TARGETS, Target
from streamvid.studies.jobs import result_file, write_result
from streamvid.studies.plane_metrics import NUM_POINTS, median_distance, modes_covered


@dataclass(frozen=True)
class Effort:
    """How long a run is."""

    student_updates: int = 1000  # times the objective's ``LENGTHS``
    batch_size: int = 512
    start_steps: int = 3000  # of the network that every run begins with
    num_sets: int = 9  # sets of points that are compared
    rate: float = 1e-3


QUICK = Effort(student_updates=3, batch_size=32, start_steps=3, num_sets=1)


LENGTHS = {
    **dict.fromkeys(("lcm", "slam", "boot", "tcd"), 4),
    **dict.fromkeys(("snoopi", "few_step_sid"), 3),
    **dict.fromkeys(
        ("dmd2", "uni_dad", "flash_dmd", "sid", "tdm", "twinflow", "ladd", "scott", "add", "dmdx"),
        2,
    ),
}
"""Objectives that take more updates than ``Effort`` says: of cheap ones many, of several steps each
gets a part of all."""


def pretrain(target: Target, effort: Effort, seed: int = 0) -> PointNet:
    """The start: flow matching to the target, on s = t only; it knows velocities and no jumps."""
    torch.manual_seed(seed)
    target = target.pretraining
    net, generator = PointNet(target.num_prompts), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), effort.rate)
    for step in range(effort.start_steps):
        optimizer.param_groups[0]["lr"] = effort.rate * (1 - step / effort.start_steps)
        cond = torch.randint(target.num_prompts, (effort.batch_size,), generator=generator)
        x0, t = target.sample(cond, generator), torch.rand(len(cond), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        shown = torch.where(
            torch.rand(len(cond), generator=generator) < 0.15, target.num_prompts, cond
        )
        loss = flow_matching_loss(net(add_noise(x0, eps, t), t, t, shown), x0, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def load_start(target: Target, effort: Effort, folder: Path) -> PointNet:
    """``pretrain``, kept in a file, so that every run begins with the same network."""
    file = folder / f"start_{target.name}_{effort.start_steps}.pt"
    net = PointNet(target.num_prompts)
    if not file.exists():
        with atomic_file(file) as temporary:
            torch.save(pretrain(target, effort).state_dict(), temporary)
    net.load_state_dict(torch.load(file, weights_only=True))
    return net.requires_grad_(False)


OPTIONS: dict[str, dict[str, Any]] = {
    "asd": {"asd_weight": 0.3, "discriminator_updates_per_cycle": 1, "r1_weight": 40.0}
    | {"r2_weight": 40.0},
    "afd": {"time_law": "uniform", "beta": 0.5, "lam_prior": 1e-3, "old_decay": 0.99}
    | {"self_normalized": False, "r1_weight": 20.0, "r2_weight": 0.0, "discriminator_t": 0.02},
}
"""Options of objectives whose own defaults are for clips."""


def plane_objectives() -> dict[str, type[Objective]]:
    """Those that make sense on points, by name."""
    return {name: kind for name, kind in all_objectives().items() if kind.on_points}


def for_target(kind: type[Objective], target: Target) -> Objective:
    """An objective with the plane's unshifted times and the target's guidance."""
    options: dict[str, Any] = {"shift": 1.0}
    if issubclass(kind, Distillation):
        options["guidance_scale"] = target.scale
    return kind(**options, **OPTIONS.get(kind.name, {}))


def distil(
    objective: Objective,
    target: Target,
    start: PointNet,
    effort: Effort,
    seed: int = 0,
    updates: int | None = None,
) -> Laboratory:
    """Train for so many updates of the student, by default the effort's; it is then the average of
    its last weights.

    Raises:
        ValueError: if a loss is not finite.
    """
    updates = effort.student_updates if updates is None else updates
    torch.manual_seed(seed)
    num_pairs = max(min(16384, effort.batch_size * 32), 64)
    lab = Laboratory(target, start, objective, num_pairs, seed + 2)
    rng = torch.Generator().manual_seed(seed + 1)
    networks = objective.networks()
    rates = dict.fromkeys(networks, effort.rate)
    rates["student"] = effort.rate / 2 * objective.rate
    betas = (0.5, 0.99) if len(networks) > 1 else (0.9, 0.99)
    optimizers = {
        name: torch.optim.Adam(lab.parameters(name), rates[name], betas=betas) for name in networks
    }
    final = [p.detach().clone() for p in lab.parameters("student")]
    done = 0
    for number in itertools.count():
        if done == updates:
            break
        progress = done / updates
        for turn in objective.turns(number):
            cond = torch.randint(target.num_prompts, (effort.batch_size,), generator=rng)
            step = PlaneStep(lab, objective, turn, cond, rng, progress)
            ramp = min(1.0, 2 * (1 - progress), 0.05 + progress / 0.05)
            optimizers[turn].param_groups[0]["lr"] = rates[turn] * ramp
            _update(step, optimizers[turn])
            if turn == "student":
                _follow(lab, objective)
                couple(final, lab.parameters("student"), 0.99 if progress > 0.2 else 0.0)
                objective.after_student(step)
                done += 1
    couple(lab.parameters("student"), final, 0.0)
    return lab


def _update(step: PlaneStep, optimizer: torch.optim.Optimizer) -> None:
    """One turn: only its own network's parameters require gradients."""
    lab = step.lab
    for name in lab.trained:
        for parameter in lab.parameters(name):
            parameter.requires_grad_(name == step.turn)
    loss = getattr(step.objective, step.turn)(step)
    optimizer.zero_grad()
    for make_part in parts_of(loss):
        part = make_part()
        if not torch.isfinite(part):
            raise ValueError(f"the loss of {step.turn} is {float(part)}; the run has diverged")
        part.backward()
    torch.nn.utils.clip_grad_norm_(lab.parameters(step.turn), 5.0)
    optimizer.step()


def _follow(lab: Laboratory, objective: Objective) -> None:
    """Move the copies of the student that the objective uses."""
    decays = {"average": objective.average_decay, "lagged": objective.lagged_decay}
    for name in decays.keys() & objective.needs:
        couple(lab.copies[name].parameters(), lab.parameters("student"), decays[name])


# ---- sampling and measuring ----------------------------------------------------------------------


@torch.no_grad()
def sample(net: Any, cond: Tensor, steps: int, sampler: str, generator: torch.Generator) -> Tensor:
    """Points ``[B, 2, 1, 1]`` of a student ``u(x, t, s, cond)``.

    Args:
        sampler: "renoise", fresh noise on each data prediction; "jump", from each time to the next;
            "euler", with the velocity u(x, t, t): how a start and a policy are sampled.
    """
    x, times = torch.randn(len(cond), 2, 1, 1, generator=generator), euler_times(steps, 1.0)
    for now, after in zip(times, times[1:]):
        t, s = torch.full((len(cond),), now), torch.full((len(cond),), after)
        if sampler == "renoise":
            x = euler_step(x, net(x, t, torch.zeros_like(t), cond), t, 0.0)
            x = (
                x
                if after == 0
                else renoise_step(x, torch.randn(x.shape, generator=generator), after)
            )
        else:
            x = euler_step(x, net(x, t, s if sampler == "jump" else t, cond), t, s)
    return x


def reference(target: Target, effort: Effort, seed: int = 1000) -> tuple[Tensor, Tensor]:
    """Prompts, evenly, and the guided teacher's points for ``num_sets`` sets."""
    count = NUM_POINTS * effort.num_sets
    cond = torch.arange(count) % target.num_prompts
    noise = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    return cond, target.flow(noise, cond)


def measure(points: Tensor, target: Target, effort: Effort) -> dict[str, float | None]:
    """Energy distance to the teacher, over its sampling floor, and modes covered."""
    _, truth = reference(target, effort)
    _, again = reference(target, effort, seed=2000)
    distance, floor = median_distance(points, truth), median_distance(again, truth)
    covered = modes_covered(points, target.means, target.width) if len(target.means) == 8 else None
    return {"distance": distance, "floor": floor, "ratio": distance / floor, "modes": covered}


def run(
    objective: Objective, target: Target, start: PointNet, effort: Effort, seed: int = 0
) -> dict[str, Any]:
    """Distil, sample and measure; some points go with the result, for the picture."""
    began = time.process_time()  # of one core, whatever else the machine does
    updates = effort.student_updates * LENGTHS.get(objective.name, 1)
    lab = distil(objective, target, start, effort, seed, updates)
    seconds = time.process_time() - began
    cond, _ = reference(target, effort)
    generator = torch.Generator().manual_seed(seed + 7)
    student = lab.trained["student"]
    points = sample(student, cond, objective.num_steps, objective.sampler, generator)
    return {
        "objective": objective.name,
        "target": target.name,
        "seed": seed,
        "steps": objective.num_steps,
        "seconds": seconds,
        "updates": updates,
        "networks": len(objective.networks()),
        **measure(points, target, effort),
        "points": points[:600].flatten(1).tolist(),
    }


def baselines(target: Target, effort: Effort, folder: Path) -> list[dict[str, Any]]:
    """The start, and the teacher, sampled with few Euler steps: what distillation has to beat."""
    start, (cond, _) = load_start(target, effort, folder), reference(target, effort)
    networks: dict[str, Callable[..., Tensor]] = {
        "start": lambda x, t, s, c: start(x, t, t, c),
        "teacher": lambda x, t, s, c: target.guided(x, t, c),
    }
    rows = []
    for label, steps in (("start", 1), ("start", 4), ("teacher", 4), ("teacher", 50)):
        points = sample(networks[label], cond, steps, "euler", torch.Generator().manual_seed(7))
        rows.append(
            {
                "objective": f"{label}, {steps} steps",
                "target": target.name,
                "seed": 0,
                "steps": steps,
                "seconds": 0.0,
                "updates": 0,
                "networks": 1,
                **measure(points, target, effort),
                "points": points[:600].flatten(1).tolist(),
            }
        )
    return rows


# ---- runs kept in files --------------------------------------------------------------------------

Job = tuple[str, str, int, Path, Effort]
"""An objective, a target, a seed, the folder of finished runs, and the effort."""


def run_job(job: Job) -> str:
    """One run on one thread, unless it is done; a line about it. A run that diverges leaves no
    file.
    """
    name, target_name, seed, folder, effort = job
    torch.set_num_threads(1)
    file = result_file(folder, name, target_name, seed)
    if file.exists():
        return f"{name} on {target_name}: done before"
    target = {**TARGETS, **COVERAGE}[target_name]()
    objective = for_target(plane_objectives()[name], target)
    try:
        result = run(objective, target, load_start(target, effort, folder), effort, seed)
    except ValueError as error:
        return f"{name} on {target_name}: {error}"
    write_result(file, result)
    return (
        f"{name} on {target_name}: {result['ratio']:.2f} times the floor, {result['seconds']:.0f} s"
    )
