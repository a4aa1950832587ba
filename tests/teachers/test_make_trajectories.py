"""The tool that solves a Wan teacher's trajectories, from its command line to the batches."""

import pytest
import torch
from safetensors.torch import load_file

from streamvid.core.times import step_times
from streamvid.data.prompts import world_prompts
from streamvid.data.trajectories import Trajectories
from tools import make_trajectories as tool


def run(folder, out, *options):
    sizes = [
        "--latent-frames",
        "2",
        "--latent-size",
        "4",
        "4",
        "--steps",
        "4",
        "--num",
        "5",
        "--clips-per-part",
        "3",
    ]
    return tool.main(["--teacher", str(folder), "--out", str(out), *sizes, *options])


def test_a_set_has_the_states_of_the_students_times_and_is_continued(pristine_folder, tmp_path):
    out = tmp_path / "set"
    assert run(pristine_folder, out, "--student-steps", "2", "--student-shift", "5") == 0
    parts = sorted(out.iterdir())
    whole = [load_file(part) for part in parts]
    assert [part.name for part in parts] == [
        "part-00000-of-00002.safetensors",
        "part-00001-of-00002.safetensors",
    ]
    parts[0].unlink()
    assert run(pristine_folder, out, "--student-steps", "2", "--student-shift", "5") == 0
    for part, made in zip(parts, whole):
        again = load_file(part)
        assert made.keys() == again.keys() and all(
            torch.equal(made[name], again[name]) for name in made
        )
    data = Trajectories(out, 0)
    assert len(data) == 5 and data.times == (*step_times(2, 5.0), 0.0)
    batch = data.batch(0, "student", 0, range(3))
    assert batch["states"].shape == (3, 3, 4, 2, 4, 4) and batch["cond"].shape == (3, 6, 8)
    assert batch["states"].isfinite().all() and set(batch["prompts"]) <= set(world_prompts(5))
    # four steps at the teacher's shift of 3, and the student's .8333
    assert len(data.settings["grid"]) == 5


def test_prompts_of_a_file_are_repeated_and_times_may_be_listed(pristine_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\na cat\n")
    options = ("--prompts", str(tmp_path / "prompts.txt"), "--times", "1,0.6", "--guidance", "1")
    assert run(pristine_folder, tmp_path / "set", *options) == 0
    data = Trajectories(tmp_path / "set", 0)
    assert data.times == (1.0, 0.6, 0.0)
    assert set(data.batch(0, "student", 0, range(20))["prompts"]) == {"a red ball", "a cat"}
    ends = data.batch(0, "student", 0, range(20))["states"][:, -1].flatten(1)
    assert len(torch.unique(ends, dim=0)) > 2  # each clip has a noise of its own


@pytest.mark.parametrize(
    "options, message",
    [
        (("--teacher", "nowhere"), "no teacher folder at nowhere"),
        (("--prompts", "nothing.txt"), "no prompt file at nothing.txt"),
        (("--num", "0"), "--num 0, expected at least 1"),
        (("--times", "1,x"), "expected numbers separated by commas"),
        (("--share", "3/2"), "share 3/2, expected a part such as 1/4"),
        (("--share", "half"), "--share half, expected a part of the work such as 1/4"),
        (("--times", "0.5,1"), "falling from at most 1 to 0"),
    ],
)
def test_bad_input_is_one_line(pristine_folder, tmp_path, capsys, options, message):
    assert run(pristine_folder, tmp_path / "set", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_shares_make_one_set(pristine_folder, tmp_path):
    for number in (1, 2):
        assert (
            run(
                pristine_folder,
                tmp_path / "set" / str(number),
                "--clips-per-part",
                "1",
                "--share",
                f"{number}/2",
            )
            == 0
        )
    assert run(pristine_folder, tmp_path / "whole", "--clips-per-part", "1") == 0
    shares, whole = Trajectories(tmp_path / "set", 0), Trajectories(tmp_path / "whole", 0)
    assert len(shares) == len(whole) == 5 and shares.fingerprint == whole.fingerprint
    batches = [data.batch(0, "student", 0, range(9)) for data in (shares, whole)]
    assert batches[0]["prompts"] == batches[1]["prompts"] and torch.equal(
        batches[0]["states"], batches[1]["states"]
    )


def test_another_guidance_does_not_go_into_the_same_folder(pristine_folder, tmp_path, capsys):
    assert run(pristine_folder, tmp_path / "set") == 0
    assert run(pristine_folder, tmp_path / "set", "--guidance", "2") == 2
    assert "guidance was 4.0, now 2.0" in capsys.readouterr().err
