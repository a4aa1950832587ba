"""`streamvid quickstart` removes what it wrote itself, and nothing before it can run."""

import pytest

from streamvid.cli import quickstart as tool
from streamvid.training.launch import RunLock


@pytest.fixture
def ran(monkeypatch):
    """The folders of the runs that would have been trained and compared."""
    calls = []
    monkeypatch.setattr(
        "streamvid.experiment.build.build_trainer", lambda config: calls.append(config) or Nothing()
    )
    monkeypatch.setattr(tool, "compare", lambda run_dir, num_prompts: calls.append(run_dir))
    return calls


class Nothing:
    def train(self):
        pass


def old_run(folder):
    run_dir = folder / "quickstart"
    for name in (
        "checkpoints/step-0000001/student.safetensors",
        "student/README.md",
        "config.yaml",
        "clip_0.mp4",
        "report.md",
    ):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("old")
    (run_dir / "thesis.txt").write_text("mine")
    return run_dir


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_quickstart_begins_anew_and_keeps_what_is_not_its_own(tmp_path, ran):
    run_dir = old_run(tmp_path)
    assert tool.main(["--output-dir", str(tmp_path), "--minutes", "0.5"]) == 0
    assert names(run_dir) == [".lock", "thesis.txt"]
    assert (
        ran[0].train.max_minutes == 0.5
        and ran[1] == run_dir
        and ran[0].train.output_dir == str(tmp_path)
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--minutes", "0"], "max_minutes=0.0 must be above 0"),
        (["--minutes", "-1"], "max_minutes=-1.0 must be above 0"),
        (["--minutes", "nan"], "--minutes nan, expected a finite number"),
        (["--prompts", "9"], "--prompts is called --num-prompts N now"),
        (["--num-prompts", "0"], "--num-prompts=0, expected at least 1"),
    ],
)
def test_what_can_not_run_removes_nothing(tmp_path, ran, capsys, argv, message):
    before = names(old_run(tmp_path))
    try:
        code = tool.main(["--output-dir", str(tmp_path), *argv])
    except SystemExit as stop:  # of the parser
        code = stop.code
    assert code == 2
    assert (
        message in capsys.readouterr().err and names(tmp_path / "quickstart") == before and not ran
    )


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, ran, capsys):
    run_dir = old_run(tmp_path)
    (run_dir / "config.yaml").unlink()
    before = names(run_dir)
    assert tool.main(["--output-dir", str(tmp_path)]) == 2
    assert (
        "holds checkpoints and no config.yaml, so it is no run of quickstart"
        in capsys.readouterr().err
    )
    assert names(run_dir) == before and not ran


def test_a_run_that_is_being_trained_is_left_alone(tmp_path, ran, capsys):
    run_dir = old_run(tmp_path)
    lock = RunLock(run_dir)
    before = names(run_dir)
    assert tool.main(["--output-dir", str(tmp_path)]) == 2
    lock.release()
    assert (
        "this run is being trained by process" in capsys.readouterr().err
        and names(run_dir) == before
        and not ran
    )
