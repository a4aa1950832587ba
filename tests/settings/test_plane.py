"""The laboratory's teachers are exact, its distance is fair, and a run from the command line leaves
a whole report.
"""

import json

import pytest
import torch

from streamvid.cli import toy2d
from streamvid.objectives.afd import AFD
from streamvid.objectives.dmd import DMD
from streamvid.objectives.score import SiDA
from streamvid.settings.plane import Laboratory, PlaneStep, PointNet
from streamvid.settings.targets import TARGETS, Target
from streamvid.studies.plane import (
    QUICK,
    Effort,
    distil,
    for_target,
    load_start,
    pretrain,
    sample,
)
from streamvid.studies.plane_metrics import (
    NUM_POINTS,
    energy_distance,
    median_distance,
    modes_covered,
)


@pytest.mark.parametrize("name", TARGETS)
def test_the_velocity_is_the_conditional_mean(name):
    """E[(eps - x0 - v(x_t)) f(x_t)] = 0 for any f: the residual of a regression."""
    target, generator = TARGETS[name](), torch.Generator().manual_seed(0)
    cond = torch.randint(target.num_prompts, (100000,), generator=generator)
    x0 = target.sample(cond, generator).double()
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for t in (0.3, 0.8):
        x_t, time = (1 - t) * x0 + t * eps, torch.full((len(x0),), t, dtype=torch.float64)
        residual = (eps - x0 - target.velocity(x_t, time, cond)).flatten(1)
        for probe in (
            torch.ones(len(x0), 2, dtype=torch.float64),
            x_t.flatten(1),
            x_t.flatten(1).sin(),
        ):
            product = residual * probe
            assert (product.mean(0).abs() < 4.5 * product.std(0) / len(x0) ** 0.5).all()


def test_no_prompt_is_all_prompts():
    target = TARGETS["prompts"]()
    x, t = torch.randn(50, 2, 1, 1), torch.rand(50) * 0.9 + 0.05
    whole = Target("all", target.means, target.width, target.prompts.mean(0, keepdim=True))
    torch.testing.assert_close(
        target.velocity(x, t, None), whole.velocity(x, t, torch.zeros(50, dtype=torch.long))
    )


def test_the_flow_ends_in_the_law():
    """Unguided, the teacher's samples are as near to its law as its law to itself."""
    target = TARGETS["ring"]()
    generator = torch.Generator().manual_seed(0)
    cond = torch.zeros(4 * NUM_POINTS, dtype=torch.long)
    points = target.flow(torch.randn(len(cond), 2, 1, 1, generator=generator), cond)
    truth, again = target.sample(cond, generator), target.sample(cond, generator)
    floor = median_distance(again, truth)
    assert median_distance(points, truth) < 1.6 * floor
    assert modes_covered(points, target.means, target.width) == 8


def test_afd_learns_from_the_guided_teachers_samples():
    """It learned from unguided data, which on the prompts is 32 floors from what it is measured
    against.
    """
    target = TARGETS["prompts"]()
    objective = for_target(AFD, target)
    lab = Laboratory(target, PointNet(target.num_prompts), objective, num_pairs=512)
    cond = torch.arange(2 * NUM_POINTS) % target.num_prompts
    rng = torch.Generator().manual_seed(0)
    seen = []
    lab.logits = lambda x, t, _: seen.append(x) or x.flatten(1)[:, :1].requires_grad_()
    objective.discriminator(PlaneStep(lab, objective, "discriminator", cond, rng))
    real = seen[0].unflatten(0, (-1, 2))[:, 0]
    noise = torch.randn(len(cond), 2, 1, 1, generator=rng)
    guided, unguided = target.flow(noise, cond), target.sample(cond, rng)
    assert median_distance(real, guided) < 0.1 * median_distance(real, unguided)


def test_the_floor_of_the_distance():
    """Two sets of N points of one law are about 2 E|x - x'| / N apart; equal sets are not."""
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(40, 500, 2, generator=generator)
    values = torch.tensor([energy_distance(a, b) for a, b in zip(sets[::2], sets[1::2])])
    expected = 2 * torch.pi**0.5 / 500  # E|x - x'| of a unit Gaussian in the plane is sqrt(pi)
    assert float(values.mean()) == pytest.approx(expected, rel=0.2)
    assert energy_distance(sets[0], sets[0]) == pytest.approx(0, abs=1e-12)
    assert energy_distance(sets[0], sets[1] + 0.5) > 10 * expected


def test_a_lost_mode_shows():
    target = TARGETS["ring"]()
    points = target.sample(torch.zeros(800, dtype=torch.long), torch.Generator().manual_seed(0))
    lost = points[(points.flatten(1) - target.means[0]).norm(dim=1) > 0.6]
    assert modes_covered(points, target.means, target.width) == 8
    assert modes_covered(lost, target.means, target.width) == 7


def test_a_run_is_a_function_of_its_seed_and_leaves_the_start_alone(tmp_path):
    target = TARGETS["ring"]()
    objective = for_target(SiDA, target)
    start = load_start(target, QUICK, tmp_path)
    kept = [p.clone() for p in start.parameters()]
    one, two, other = (
        distil(objective, target, start, QUICK, seed).parameters("student") for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not all(torch.equal(a, b) for a, b in zip(one, other))
    assert all(torch.equal(a, b) for a, b in zip(kept, start.parameters()))


def test_distillation_brings_a_one_step_student_near():
    """Short of the report's effort, DMD takes one step from hundreds of times the floor to near
    it.
    """
    effort = Effort(student_updates=120, batch_size=256, start_steps=600, num_sets=3)
    target = TARGETS["ring"]()
    start = pretrain(target, effort)
    lab = distil(for_target(DMD, target), target, start, effort)
    cond = torch.zeros(3 * NUM_POINTS, dtype=torch.long)
    truth = target.sample(cond, torch.Generator().manual_seed(5))
    before, after = (
        median_distance(sample(net, cond, 1, "renoise", torch.Generator().manual_seed(0)), truth)
        for net in (lambda x, t, s, c: start(x, t, t, c), lab.trained["student"])
    )
    assert after < before / 20


def test_the_tool_writes_a_report_and_goes_on_where_it_was(tmp_path, capsys):
    arguments = [
        "--quick",
        "--only",
        "dmd,cd",
        "--targets",
        "prompts",
        "--jobs",
        "1",
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "report.json"),
    ]
    assert toy2d.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| dmd " in table and "| cd " in table and "start, 1 steps" in table
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {(row["objective"], row["target"]) for row in rows} >= {
        ("dmd", "prompts"),
        ("cd", "prompts"),
    }
    assert (tmp_path / "report.png").is_file() and "floor" in (tmp_path / "report.md").read_text()
    assert toy2d.main(arguments) == 0
    assert capsys.readouterr().err.count("done before") == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "dmd3"], "--only dmd3: expected some of"),
        (["--targets", "square"], "--targets square: expected some of ring, moons, prompts"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--out", "report.txt"], "the report is a .json file"),
    ],
)
def test_bad_requests_end_with_one_line(arguments, said, capsys):
    assert toy2d.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_list_names_papers(capsys):
    assert toy2d.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        any(line.startswith("dmd2") and "2405.14867" in line for line in lines) and len(lines) >= 42
    )
