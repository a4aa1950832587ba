"""A set of trajectories survives interruptions, refuses mixtures, and is read a sample at a
time.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamvid.data.trajectories import Trajectories, time_indices, write_trajectories
from streamvid.seeding import keyed_normal

TIMES = (1.0, 0.75, 0.0)
PROMPTS = [f"prompt {i}" for i in range(7)]


class Solver:
    """States that tell their seed and time; it may break down after some clips."""

    def __init__(self, breaks_after=None):
        self.seeds, self.breaks_after = [], breaks_after

    def __call__(self, cond, seeds):
        if self.breaks_after is not None and len(self.seeds) >= self.breaks_after:
            raise KeyboardInterrupt
        self.seeds += seeds
        states = torch.tensor(seeds)[:, None] + torch.tensor(TIMES)
        return states[:, :, None, None, None, None].expand(len(seeds), 3, 2, 4, 1, 1).double()


def embed(prompts):
    return torch.stack([keyed_normal((5, 2), prompt) for prompt in prompts])


def write(folder, solve, prompts=PROMPTS, times=TIMES, first_seed=10, share=(1, 1), **settings):
    write_trajectories(
        folder,
        prompts,
        times,
        embed,
        solve,
        settings,
        first_seed,
        clips_per_part=3,
        batch_size=2,
        share=share,
    )


def test_what_is_written_is_read(tmp_path):
    solver = Solver()
    write(tmp_path / "set", solver, guidance=4.0)
    assert solver.seeds == list(range(10, 17))
    data = Trajectories(tmp_path / "set", 0)
    assert len(data) == 7 and data.times == TIMES and data.settings["guidance"] == 4.0
    batch = data.batch(0, "student", 0, range(50))
    assert set(batch["prompts"]) == set(PROMPTS)
    assert batch["states"].shape == (50, 3, 2, 4, 1, 1) and batch["states"].dtype == torch.float32
    for i, prompt in enumerate(batch["prompts"]):
        seed = 10 + PROMPTS.index(prompt)
        torch.testing.assert_close(batch["states"][i, :, 0, 0, 0, 0], seed + torch.tensor(TIMES))
        assert torch.equal(batch["cond"][i], embed([prompt])[0].half().float())
        assert batch["times"][i].tolist() == list(TIMES)


def test_a_sample_is_a_function_of_its_place(tmp_path):
    write(tmp_path, Solver())
    data = Trajectories(tmp_path, 0)
    whole = data.batch(4, "student", 0, range(8))
    parts = [data.batch(4, "student", 0, indices) for indices in (range(3), range(3, 8))]
    assert torch.equal(whole["states"], torch.cat([part["states"] for part in parts]))
    assert whole["keys"] == parts[0]["keys"] + parts[1]["keys"] and len(set(whole["keys"])) == 8
    assert Trajectories(tmp_path, 1).batch(4, "student", 0, range(8))["keys"] != whole["keys"]


def test_an_interrupted_job_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "broken", Solver(breaks_after=4))
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [
        "part-00000-of-00003.safetensors"
    ]
    with pytest.raises(ValueError, match="1 of 3 parts; the command that made them goes on"):
        Trajectories(tmp_path / "broken", 0)
    rest = Solver()
    write(tmp_path / "broken", rest)
    assert rest.seeds == [13, 14, 15, 16]
    write(tmp_path / "whole", Solver())
    for path in (tmp_path / "whole").iterdir():
        made, again = load_file(path), load_file(tmp_path / "broken" / path.name)
        assert made.keys() == again.keys() and all(
            torch.equal(made[name], again[name]) for name in made
        )
    write(tmp_path / "whole", Solver(breaks_after=0))  # nothing is left to do


def test_two_processes_in_one_folder_divide_the_work(tmp_path):
    """The second of two did all of the first one's work again."""
    solvers, together = [Solver(), Solver()], Barrier(2)

    def work(solver):
        def solve(cond, seeds):
            if not solver.seeds:  # neither ends before the other has begun
                together.wait(30)
            return solver(cond, seeds)

        write(tmp_path, solve)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, solvers))
    assert all(solver.seeds for solver in solvers)
    assert sorted(solvers[0].seeds + solvers[1].seeds) == list(range(10, 17))
    assert len(Trajectories(tmp_path, 0)) == 7


def test_shares_of_several_machines_are_joined(tmp_path):
    solvers = [Solver(), Solver()]
    for number, solver in enumerate(solvers, start=1):
        place, teacher = tmp_path / "set" / f"machine{number}", f"/disk{number}/wan"
        write(place, solver, share=(number, 2), teacher=teacher, teacher_weights="a")
    assert [solver.seeds for solver in solvers] == [[10, 11, 12, 16], [13, 14, 15]]
    assert {text for *_, text in Trajectories(tmp_path / "set", 0)._rows} == set(PROMPTS)
    with pytest.raises(ValueError, match="machine1 has 2 of 3 parts"):
        Trajectories(tmp_path / "set" / "machine1", 0)
    with pytest.raises(ValueError, match="share 3/2, expected a part such as 1/4"):
        write(tmp_path / "other", Solver(), share=(3, 2))


def test_sets_made_alike_are_joined_and_others_are_not(tmp_path):
    write(tmp_path / "a", Solver(), guidance=4.0)
    write(tmp_path / "b", Solver(), PROMPTS[:4], first_seed=100, guidance=4.0)
    data = Trajectories(tmp_path, 0)
    assert len(data) == 11 and data.fingerprint != Trajectories(tmp_path / "a", 0).fingerprint
    ends = data.batch(0, "student", 0, range(200))["states"][:, -1].flatten().unique().tolist()
    assert ends == [*range(10, 17), *range(100, 104)]
    write(tmp_path / "c", Solver(), guidance=2.0, first_seed=200)
    with pytest.raises(ValueError, match=r"of different sets \(guidance\); keep each"):
        Trajectories(tmp_path, 0)
    shutil.rmtree(tmp_path / "c")
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    with pytest.raises(ValueError, match="holds 3 parts twice"):
        Trajectories(tmp_path, 0)


def test_another_teacher_at_the_same_place_is_noticed(tmp_path):
    write(tmp_path, Solver(), teacher="/wan", teacher_weights="a")
    write(tmp_path, Solver(breaks_after=0), teacher="/elsewhere/wan", teacher_weights="a")
    write(tmp_path, Solver(breaks_after=0), teacher="/wan")  # of a version that did not look
    with pytest.raises(ValueError, match="teacher_weights was a, now b"):
        write(tmp_path, Solver(), teacher="/wan", teacher_weights="b")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"guidance": 2.0}, "guidance was 4.0, now 2.0"),
        ({"times": (1.0, 0.5, 0.0)}, "times was"),
        ({"prompts": PROMPTS[:6]}, "num_clips was 7, now 6"),
        ({"prompts": PROMPTS[::-1]}, "prompts was"),
        ({"first_seed": 11}, "first_seed was 10, now 11"),
    ],
)
def test_other_settings_do_not_go_into_the_same_folder(tmp_path, change, message):
    write(tmp_path, Solver(), guidance=4.0)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, Solver(), **{"guidance": 4.0, **change})


def test_a_missing_or_damaged_set_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no trajectories in .*streamvid trajectories"):
        Trajectories(tmp_path / "nothing", 0)
    write(tmp_path, Solver())
    part = tmp_path / "part-00001-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(ValueError, match="part-00001-of-00003.safetensors is damaged") as caught:
        Trajectories(tmp_path, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"states": torch.zeros(2, 3, 2, 4, 1, 1)},
            r"states of \[2, 3, 2, 4, 1, 1\] and embeddings of .* for 1 captions",
        ),
        ({"states": torch.zeros(1, 2, 2, 4, 1, 1)}, "states of"),
        ({"embeddings": torch.zeros(2, 5, 2)}, "embeddings of"),
        ({"states": torch.zeros(1, 3, 2, 4, 1, 1, dtype=torch.int8)}, "states are I8"),
    ],
)
def test_a_part_that_holds_something_else_is_one_line(tmp_path, change, said):
    about = {"times": TIMES, "captions": ["a"], "settings": {}}
    tensors = {"states": torch.zeros(1, 3, 2, 4, 1, 1), "embeddings": torch.zeros(1, 5, 2)}
    path = tmp_path / "part-00000-of-00001.safetensors"
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    assert len(Trajectories(tmp_path, 0)) == 1
    save_file(tensors | change, path, metadata={"about": json.dumps(about)})
    with pytest.raises(ValueError, match=f"is damaged .*{said}.*delete it and make it again"):
        Trajectories(tmp_path, 0)


@pytest.mark.parametrize(
    "times", [(1.0, 0.5), (0.5, 0.75, 0.0), (1.5, 0.0), (0.0,), (1.0, 1.0, 0.0)]
)
def test_times_that_do_not_fall_to_0_are_refused(tmp_path, times):
    with pytest.raises(ValueError, match="falling from at most 1 to 0"):
        write(tmp_path, Solver(), times=times)


def test_times_are_found_to_float32_and_others_are_named():
    stored = torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0]).tolist()
    assert time_indices(stored, [5 / 6, 0.0, 1.0]) == [2, 4, 0]
    with pytest.raises(ValueError, match=r"no states at t=0.9, 0.6, .* only at 1, 0.9375"):
        time_indices(stored, [0.9, 0.625, 0.6])
