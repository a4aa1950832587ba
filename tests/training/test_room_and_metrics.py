"""What a run writes: how much room that takes, said beforehand, and the lines of its metrics."""

import json
import logging
import math
from collections import namedtuple
from pathlib import Path

import pytest

from streamvid.experiment import room
from streamvid.experiment.build import build_trainer
from streamvid.experiment.config import load_run
from streamvid.training import metrics
from streamvid.training.metrics import RunningMeans, append_metrics, read_metrics, trim_metrics

TINY = Path(__file__).parents[2] / "configs" / "run" / "tiny_dmd.yaml"
Usage = namedtuple("Usage", "total used free")


def run_of(folder, *overrides):
    small = [
        "train.max_steps=2",
        "train.batch_size=1",
        "data.num_prompts=2",
        "options.student_start_step=0",
    ]
    early = ["options.fake_updates_per_student=1", "rollout.num_chunks=1", "train.save_every=1"]
    return load_run(TINY, [f"train.output_dir={folder}", *small, *early, *overrides])


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_room_is_what_the_run_then_takes(tmp_path):
    config = run_of(tmp_path)
    expected = room.room_of(config)
    run_dir = build_trainer(config, progress=False).train()
    sizes = [size_of(path) for path in sorted((run_dir / "checkpoints").iterdir())]
    export = size_of(run_dir / "student")
    assert len(sizes) == expected.num_checkpoints == 2
    assert sizes[-1] == pytest.approx(expected.checkpoint, rel=0.01)
    assert export == pytest.approx(expected.export, rel=0.01)
    assert expected.bytes == 2 * expected.checkpoint + expected.export


def test_adapters_take_the_room_of_adapters_and_their_export_that_of_a_network(tmp_path):
    whole, lora = (
        room.room_of(run_of(tmp_path)),
        room.room_of(run_of(tmp_path, "student.lora.rank=2", "fake_score.lora_rank=2")),
    )
    assert lora.checkpoint < whole.checkpoint / 20
    assert whole.export <= lora.export < 1.05 * whole.export


@pytest.mark.parametrize("kept, saves, at_once", [(2, 10, 3), (5, 10, 6), (5, 2, 2), (1, 1, 1)])
def test_a_short_run_writes_fewer_checkpoints_than_are_kept(tmp_path, kept, saves, at_once):
    config = run_of(
        tmp_path,
        f"train.keep_checkpoints={kept}",
        "train.save_every=10",
        f"train.max_steps={10 * saves - 1}",
    )
    assert room.room_of(config).num_checkpoints == at_once


def test_a_disk_without_room_for_a_checkpoint_is_refused_and_a_small_one_warned_of(
    tmp_path, monkeypatch, caplog
):
    config = run_of(tmp_path / "deep" / "down", "train.keep_checkpoints=1")
    need = room.room_of(config)
    asked = []

    def disk(free):
        monkeypatch.setattr(
            room.shutil, "disk_usage", lambda path: asked.append(Path(path)) or Usage(0, 0, free)
        )

    with caplog.at_level(logging.WARNING):
        disk(need.bytes)
        room.ensure_room(config)
        assert not caplog.records and asked == [tmp_path]  # the nearest folder that is there
        disk(need.bytes - 1)
        room.ensure_room(config)
        assert (
            "this run will write 0.2" in caplog.text
            and "set train.keep_checkpoints=1" in caplog.text
        )
        disk(need.checkpoint - 1)
        with pytest.raises(
            ValueError,
            match="a checkpoint of this run takes 0.10 GiB, free on .* are 0.10; make room",
        ):
            room.ensure_room(config)
    assert not (tmp_path / "deep").exists()


def test_what_a_run_has_written_already_counts_as_room(tmp_path, monkeypatch, caplog):
    config = run_of(tmp_path, "train.keep_checkpoints=1")
    need = room.room_of(config)
    old = tmp_path / "tiny_dmd" / "checkpoints" / "step-0000001"
    old.mkdir(parents=True)
    with (old / "student.safetensors").open("wb") as file:
        file.truncate(need.checkpoint)
    monkeypatch.setattr(
        room.shutil, "disk_usage", lambda path: Usage(0, 0, need.bytes - need.checkpoint)
    )
    with caplog.at_level(logging.WARNING):
        room.ensure_room(config)
    assert not caplog.records


def refuse(constant):
    """NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(constant)


def test_a_damaged_line_of_metrics_is_dropped_alone(tmp_path):
    """All lines after it used to go with it."""
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 7):
        append_metrics(path, {"step": step, "loss": float("nan") if step == 6 else 0.5})
    assert json.loads(path.read_text().splitlines()[-1], parse_constant=refuse)["loss"] is None
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:8]
    lines[3:3] = [
        b"\xff\xfe\x00",
        b"[1]",
        b"null",
        b"{}",
        b'{"step": "4"}',
        b'{"step": null}',
        b"[" * 100000,
    ]
    path.write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 4, 5, 6]
    trim_metrics(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4, 5]


def test_a_maximum_is_one_over_steps_passes_and_processes_however_they_are_divided(monkeypatch):
    """Other numbers are means. The second process is a resumed one: its state went through a
    file.
    """
    values = [3.0, 9.0, 1.0, 2.0, 7.0, 2.0]
    for cut in range(len(values) + 1):
        one, two = RunningMeans(), RunningMeans()
        for means, share in ((one, values[:cut]), (two, values[cut:])):
            for value in share:
                means.add({"student/latent_max": -value, "student/latent_rms": value})
        resumed = RunningMeans()
        resumed.load_state_dict(json.loads(json.dumps(two.state_dict())))
        monkeypatch.setattr(metrics, "gather_object", lambda own: [*own, resumed.state_dict()])
        assert one.take() == {"student/latent_max": -1.0, "student/latent_rms": 4.0}
        monkeypatch.setattr(metrics, "gather_object", list)
        assert one.take() == {}


def test_a_maximum_that_was_none_once_stays_none():
    means = RunningMeans()
    for value in (1.0, math.nan, 2.0):
        means.add({"latent_max": value})
    assert math.isnan(means.take()["latent_max"])


def test_the_sum_of_maxima_in_a_checkpoint_of_before_gives_their_mean():
    means = RunningMeans()
    means.load_state_dict({"sums": {"latent_max": 6.0}, "counts": {"latent_max": 3}})
    assert means.take() == {"latent_max": 2.0}
