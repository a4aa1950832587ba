"""Distil one target with one preset: a run of some seconds, a function of its seed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamvid.core.fitting import couple, flow_matching_loss
from streamvid.core.process import add_noise, euler_step, renoise_step
from streamvid.core.times import euler_times
from streamvid.files import atomic_file
from streamvid.objectives import all_presets
from streamvid.objectives.base import Context, Preset
from streamvid.settings.plane import Laboratory, PointNet
from streamvid.settings.targets import COVERAGE, TARGETS, Target
from streamvid.studies.jobs import result_file, write_result
from streamvid.studies.plane_metrics import NUM_POINTS, median_distance, modes_covered


@dataclass(frozen=True)
class Effort:
    """How long a run is."""

    student_updates: int = 1000  # times the preset's ``LENGTHS``
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
"""Presets that take more updates than ``Effort`` says: of cheap ones many, of several steps each
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


def distil(
    preset: Preset,
    target: Target,
    start: PointNet,
    effort: Effort,
    seed: int = 0,
    updates: int | None = None,
) -> Laboratory:
    """Train for so many updates of the student, by default the effort's; it is then the average of
    its last weights.
    """
    updates = effort.student_updates if updates is None else updates
    torch.manual_seed(seed)
    lab, rng = Laboratory(target, start, preset), torch.Generator().manual_seed(seed + 1)
    bank = _bank(target, effort, seed + 2)
    phases = [
        name
        for name, loss in (("critic", preset.critic), ("disc", preset.disc))
        if loss is not None
    ]
    rates = {"student": effort.rate / 2 * preset.rate, "critic": effort.rate, "disc": effort.rate}
    betas = (0.5, 0.99) if phases else (0.9, 0.99)
    optimizers = {
        name: torch.optim.Adam(lab.parameters(name), rates[name], betas=betas)
        for name in [*phases, "student"]
    }
    final = [p.detach().clone() for p in lab.student_parameters()]
    for step in range(updates):
        progress = step / updates
        for phase in [
            p for p in phases for _ in range(preset.critic_updates if p == "critic" else 1)
        ] + ["student"]:
            ctx = _context(lab, preset, target, effort, rng, bank, progress)
            optimizers[phase].param_groups[0]["lr"] = rates[phase] * min(
                1.0, 2 * (1 - progress), 0.05 + progress / 0.05
            )
            _update(getattr(preset, phase), ctx, lab, phase, optimizers[phase])
        if preset.average is not None:
            couple(lab.average_net.parameters(), lab.student_parameters(), preset.average)
        couple(lab.lagged_net.parameters(), lab.student_parameters(), 0.99)
        couple(final, lab.student_parameters(), 0.99 if progress > 0.2 else 0.0)
        if preset.after_student is not None:
            preset.after_student(ctx)
    couple(lab.student_parameters(), final, 0.0)
    return lab


def _update(
    loss: Any, ctx: Context, lab: Laboratory, phase: str, optimizer: torch.optim.Optimizer
) -> None:
    for name in lab.trained:
        for parameter in lab.parameters(name):
            parameter.requires_grad_(name == phase)
    value = loss(ctx)
    if not torch.isfinite(value):
        raise ValueError(f"the loss of {phase} is {float(value)}; the run has diverged")
    optimizer.zero_grad()
    value.backward()
    torch.nn.utils.clip_grad_norm_(lab.parameters(phase), 5.0)
    optimizer.step()


def _bank(
    target: Target, effort: Effort, seed: int, size: int = 16384
) -> list[tuple[Tensor, Tensor]]:
    """Stored pairs (noise, the guided teacher's sample) of each prompt."""
    generator = torch.Generator().manual_seed(seed)
    size = max(min(size, effort.batch_size * 32), 64)
    noises = [torch.randn(size, 2, 1, 1, generator=generator) for _ in range(target.num_prompts)]
    return [(noise, target.flow(noise, torch.full((size,), p))) for p, noise in enumerate(noises)]


def _context(
    lab: Laboratory,
    preset: Preset,
    target: Target,
    effort: Effort,
    rng: torch.Generator,
    bank: list,
    progress: float,
) -> Context:
    def pairs(cond: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(bank[0][0]), (len(cond),), generator=rng)
        noise, sample = (torch.stack([bank[p][i] for p in range(len(bank))]) for i in range(2))
        return noise[cond, rows], sample[cond, rows]

    return Context(
        networks=lab,
        cond=torch.randint(target.num_prompts, (effort.batch_size,), generator=rng),
        shape=(2, 1, 1),
        rng=rng,
        preset=preset,
        data=lambda cond: target.sample(cond, rng),
        pairs=pairs,
        reward=target.log_density,
        progress=progress,
    )


# ---- sampling and measuring ---------------------------------------------------------------------------


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


def measure(points: Tensor, target: Target, effort: Effort) -> dict[str, float]:
    """Energy distance to the teacher, over its sampling floor, and modes covered."""
    _, truth = reference(target, effort)
    _, again = reference(target, effort, seed=2000)
    distance, floor = median_distance(points, truth), median_distance(again, truth)
    covered = modes_covered(points, target.means, target.width) if len(target.means) == 8 else None
    return {"distance": distance, "floor": floor, "ratio": distance / floor, "modes": covered}


def run(
    name: str, preset: Preset, target: Target, start: PointNet, effort: Effort, seed: int = 0
) -> dict[str, Any]:
    """Distil, sample and measure; some points go with the result, for the picture."""
    began = time.process_time()  # of one core, whatever else the machine does
    updates = effort.student_updates * LENGTHS.get(name, 1)
    lab = distil(preset, target, start, effort, seed, updates)
    seconds = time.process_time() - began
    cond, _ = reference(target, effort)
    points = sample(
        lab.student, cond, preset.steps, preset.sampler, torch.Generator().manual_seed(seed + 7)
    )
    return {
        "preset": name,
        "target": target.name,
        "seed": seed,
        "steps": preset.steps,
        "seconds": seconds,
        "updates": updates,
        "networks": 1 + sum(loss is not None for loss in (preset.critic, preset.disc)),
        **measure(points, target, effort),
        "points": points[:600].flatten(1).tolist(),
    }


def baselines(target: Target, effort: Effort, folder: Path) -> list[dict[str, Any]]:
    """The start, and the teacher, sampled with few Euler steps: what distillation has to beat."""
    start, (cond, _) = load_start(target, effort, folder), reference(target, effort)
    networks = {
        "start": lambda x, t, s, c: start(x, t, t, c),
        "teacher": lambda x, t, s, c: target.guided(x, t, c),
    }
    rows = []
    for label, steps in (("start", 1), ("start", 4), ("teacher", 4), ("teacher", 50)):
        points = sample(networks[label], cond, steps, "euler", torch.Generator().manual_seed(7))
        rows.append(
            {
                "preset": f"{label}, {steps} steps",
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


# ---- runs kept in files -------------------------------------------------------------------------------

Job = tuple[str, str, int, Path, Effort]
"""A preset, a target, a seed, the folder of finished runs, and the effort."""


def run_job(job: Job) -> str:
    """One run on one thread, unless it is done; a line about it. A run that diverges leaves no
    file.
    """
    name, target_name, seed, folder, effort = job
    torch.set_num_threads(1)
    file, target = (
        result_file(folder, name, target_name, seed),
        {**TARGETS, **COVERAGE}[target_name](),
    )
    if file.exists():
        return f"{name} on {target_name}: done before"
    try:
        result = run(
            name,
            all_presets()[name](target.scale),
            target,
            load_start(target, effort, folder),
            effort,
            seed,
        )
    except ValueError as error:
        return f"{name} on {target_name}: {error}"
    write_result(file, result)
    return (
        f"{name} on {target_name}: {result['ratio']:.2f} times the floor, {result['seconds']:.0f} s"
    )
