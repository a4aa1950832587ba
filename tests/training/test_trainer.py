"""The trainer: resume equals not stopping, accumulation and processes equal a larger batch, errors
are clear.
"""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import nn

import streamvid
from streamvid.models.video_discriminator import VideoDiscriminator
from streamvid.training import checkpoint as ckpt
from streamvid.training import trainer as trainer_module
from streamvid.training.checkpoint import list_checkpoints, read_checkpoint
from streamvid.training.config import TrainConfig
from streamvid.training.launch import RunLock
from streamvid.training.metrics import read_metrics
from streamvid.training.processes import StopSignals
from streamvid.training.trainer import Trainer, TrainingError, switch_on
from tests.fakes import TINY_WAN
from tests.training.tiny_run import everything, make_trainer

SCRIPT = Path(__file__).with_name("tiny_run.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(streamvid.__file__).parents[1]),
}


ACCELERATE = [str(Path(sys.executable).with_name("accelerate"))]


def train(output_dir, *overrides, **options):
    trainer = make_trainer(output_dir, *overrides, **options)
    trainer.train()
    return trainer


def metrics_of(trainer):
    """The metrics without the clock."""
    lines = read_metrics(trainer.run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(got, expected):
    assert metrics_of(got) == metrics_of(expected)
    got, expected = everything(got), everything(expected)
    assert got.keys() == expected.keys() and len(got) > 15
    for name in got:
        assert torch.equal(got[name], expected[name]), name


class StopAt:
    """Makes a source fail at a step, as a crash would."""

    def __init__(self, source, step):
        self.source, self.step = source, step

    def batch(self, step, *rest):
        if step == self.step:
            raise OSError("the power went")
        return self.source.batch(step, *rest)


def crash(output_dir, at, *overrides):
    trainer = make_trainer(output_dir, *overrides)
    trainer.source = StopAt(trainer.source, at)
    with pytest.raises(OSError):
        trainer.train()


# Resume


@pytest.mark.parametrize("at", [2, 4, 7, 11])
def test_resume_equals_not_having_stopped(tmp_path, at):
    """Bitwise: weights, optimisers, averages, the reference, metrics, and draws from the global
    generator.

    Checkpoints come every 4 steps and log lines every 5, so that a checkpoint falls between two
    lines.
    """
    noisy = "knobs.global_noise=true"
    whole = train(tmp_path / "whole", noisy)
    crash(tmp_path / "parts", at, noisy)
    torch.manual_seed(at)  # a resumed run must not depend on what was drawn before
    assert_same_run(train(tmp_path / "parts", noisy), whole)


def test_metrics_beyond_the_checkpoint_are_dropped_and_torn_lines_too(tmp_path):
    crash(tmp_path / "parts", 11, "train.log_every=1")
    path = tmp_path / "parts" / "tiny" / "metrics.jsonl"
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 12))
    path.write_text(path.read_text() + '{"step": 12, "stud')
    resumed = train(tmp_path / "parts", "train.log_every=1")
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 13))
    assert_same_run(resumed, train(tmp_path / "whole", "train.log_every=1"))


SLOW = ["knobs.seconds_per_loss=0.05", "train.log_every=1", "train.save_every=1000"]


def start(output_dir, *overrides, launcher=(), variables={}):
    """A run in another process."""
    command = [*(launcher or [sys.executable]), str(SCRIPT), str(output_dir), *overrides]
    return subprocess.Popen(
        command, env={**ENVIRONMENT, **variables}, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(output_dir, count):
    path = output_dir / "tiny" / "metrics.jsonl"
    while not (path.is_file() and path.read_text().count("\n") >= count):
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_process_saves_says_how_to_resume_and_resumes(tmp_path, number, code):
    often = ["train.log_every=1", "train.save_every=1000"]
    process = start(tmp_path / "parts", *often, variables={"SIGNAL_IN_STEP": f"{int(number)} 3"})
    _, error = process.communicate()
    (saved,) = list_checkpoints(tmp_path / "parts" / "tiny" / "checkpoints")
    assert process.returncode == code and saved.name == "step-0000004"
    assert f"stopped by {number.name}; the same command resumes from {saved}" in error
    assert_same_run(train(tmp_path / "parts", *often), train(tmp_path / "whole", *often))


def test_under_nohup_a_closed_terminal_stops_nothing(monkeypatch):
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.received and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, kept)


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a process is not told that its launcher has ended"
)
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_a_run_stops_with_its_launcher_and_saves(tmp_path, number):
    """A killed `accelerate launch --cpu` used to leave its process to train on to the end,
    unseen.
    """
    slow = [*SLOW, "train.max_steps=1000"]
    process = start(tmp_path, *slow, launcher=[*ACCELERATE, "launch", "--cpu"])
    wait_for_steps(tmp_path, 2)
    process.send_signal(number)
    _, error = process.communicate()  # the run shares its end of the pipe
    (saved,) = list_checkpoints(tmp_path / "tiny" / "checkpoints")
    assert f"stopped by SIGTERM; the same command resumes from {saved}" in error
    assert 2 <= int(saved.name[5:]) < 1000


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--mixed_precision", "bf16"],
            "--mixed_precision bf16, .* and the run for train.mixed_precision=no; set both",
        ),
        pytest.param(
            ["--gradient_accumulation_steps", "4"],
            "--gradient_accumulation_steps 4 does nothing here; .*NAME.accumulate=4",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--dynamo_backend", "inductor"],
            "--dynamo_backend does nothing here; leave it out and set train.compile=true",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_the_launcher_asks_is_not_ignored(tmp_path, options, message):
    process = start(tmp_path, launcher=[*ACCELERATE, "launch", "--cpu", *options])
    _, error = process.communicate()
    assert process.returncode and re.search(f"ValueError: .*{message}", error), error[-2000:]
    assert not list_checkpoints(tmp_path / "tiny" / "checkpoints")


def test_a_finished_run_trains_no_more_and_exports_again(tmp_path):
    exports = []
    first = train(tmp_path, save_fn=exports.append)
    again = train(tmp_path, save_fn=exports.append)
    assert again.method.updates == [] and exports == [first.run_dir] * 2
    assert_same_run(again, first)


def test_a_longer_run_continues_and_keeps_the_newest_checkpoints(tmp_path):
    train(tmp_path)
    longer = train(tmp_path, "train.max_steps=20", "train.keep_checkpoints=3", "train.trackers=[]")
    assert len(longer.method.updates) == 8 + 3  # steps 12 to 19; the student in 12, 15 and 18
    kept = [path.name for path in list_checkpoints(longer.checkpoints)]
    assert kept == ["step-0000012", "step-0000016", "step-0000020"]


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError) as error:
        train(
            tmp_path,
            "train.optimizers.student.lr=0.5",
            "knobs.student_every=2",
            "train.max_steps=20",
        )
    assert (
        "knobs.student_every was 3, now 2; train.optimizers.student.lr was 0.02, now 0.5."
        in str(error.value)
    )
    assert "max_steps" not in str(error.value)


def test_a_setting_of_a_later_version_counts_as_its_default(tmp_path):
    run = train(tmp_path)
    file = run.run_dir / "config.yaml"
    kept = [
        line
        for line in file.read_text().splitlines()
        if line.split(":")[0].strip() not in ("shard", "eps")
    ]
    file.write_text("\n".join(kept))
    assert len(train(tmp_path, "train.max_steps=20").method.updates) == 8 + 3
    file.write_text("\n".join(kept))
    with pytest.raises(ValueError, match="train.optimizers.student.eps was 1e-08, now 0.1. Give"):
        train(tmp_path, "train.max_steps=20", "train.optimizers.student.eps=0.1")


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    run = train(tmp_path)
    file = list_checkpoints(run.checkpoints)[-1] / "student.optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    message = (
        "step-0000012 is damaged: student.optimizer.safetensors is not as it was .*; delete that"
        " folder to resume from"
    )
    with pytest.raises(ValueError, match=f"{message} step-0000008"):
        train(tmp_path)
    shutil.rmtree(file.parent)
    assert_same_run(train(tmp_path), run)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Its files are whole and of the right shapes; every step after it would be of neither run."""
    run, other = train(tmp_path / "a"), train(tmp_path / "b", "knobs.student_every=2")
    own, foreign = (list_checkpoints(r.checkpoints)[-1] for r in (run, other))
    kept = shutil.copytree(own, tmp_path / "kept")
    shutil.copy(foreign / "student.safetensors", own / "student.safetensors")
    with pytest.raises(ValueError, match="student.safetensors is not as it was written"):
        train(tmp_path / "a")
    shutil.rmtree(own)
    shutil.copytree(foreign, own)
    with pytest.raises(
        ValueError, match="step-0000012 is damaged: it is of a run with another configuration"
    ):
        train(tmp_path / "a")
    shutil.rmtree(own)
    shutil.copytree(kept, own)
    assert_same_run(train(tmp_path / "a", "train.max_steps=12"), run)


@pytest.mark.parametrize(
    "change",
    [
        lambda counters: counters.pop("scalers"),
        lambda counters: counters.pop("updates"),
        lambda counters: counters["scalers"].pop("student"),
        lambda counters: counters.update(updates=[1, 2]),
    ],
)
def test_counters_that_lack_a_network_are_one_line(tmp_path, change):
    run = train(tmp_path)
    path = list_checkpoints(run.checkpoints)[-1]
    counters = json.loads((path / "trainer.json").read_text())
    del counters["checksum"]
    change(counters)
    (path / "trainer.json").write_text(
        json.dumps({**counters, "checksum": ckpt._checksum_of(counters)})
    )
    with pytest.raises(
        ValueError,
        match="step-0000012 is damaged: trainer.json can't be read .*; delete that folder",
    ):
        train(tmp_path)


def test_a_moved_checkout_and_a_moved_output_folder_are_the_same_run(tmp_path):
    """What ships with the package has another path there, in the saved configuration and in the
    checkpoints.
    """
    old, new = (
        "/home/a/streamvid/assets/start",
        "/opt/lib/python/site-packages/streamvid/assets/start",
    )
    run = train(tmp_path / "a", f"knobs.path={old}")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert_same_run(train(tmp_path / "b", f"knobs.path={new}"), make_moved(run, tmp_path / "b"))
    with pytest.raises(
        ValueError, match="knobs.path was streamvid/assets/start, now streamvid/assets/student"
    ):
        train(tmp_path / "b", "knobs.path=/home/a/streamvid/assets/student")


def make_moved(run, output_dir):
    run.run_dir = output_dir / "tiny"
    return run


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "1", "a: [", "a: !!python/object:os.system x", "\x00"]
)
def test_a_saved_configuration_that_is_none_is_one_line(tmp_path, text):
    run = train(tmp_path, "train.max_steps=1")
    (run.run_dir / "config.yaml").write_text(text)
    with pytest.raises(
        ValueError, match="config.yaml .*; if it is the same run, delete that file"
    ) as error:
        train(tmp_path, "train.max_steps=1")
    assert "\n" not in str(error.value)


# One run, one writer


def test_a_run_is_trained_by_one_process(tmp_path):
    """Two used to write into each other's metrics, and to remove each other's half-written
    checkpoints.
    """
    often = ["train.log_every=1"]
    # it waits for its end
    process = start(tmp_path, *often, variables={"SIGNAL_IN_STEP": f"{int(signal.SIGSTOP)} 3"})
    wait_for_steps(tmp_path, 3)
    with pytest.raises(ValueError) as error:
        train(tmp_path, *often)
    process.kill()
    process.communicate()
    host = socket.gethostname()
    assert (
        f"{tmp_path / 'tiny'}: this run is being trained by process {process.pid} on {host}; "
        in str(error.value)
    )
    resumed = train(tmp_path, *often)  # the lock has gone with its holder
    assert_same_run(resumed, train(tmp_path / "whole", *often))


def test_the_lock_ends_with_the_training(tmp_path):
    crash(tmp_path, 2)
    trainer = make_trainer(tmp_path)
    trainer.train()
    lock = RunLock(trainer.run_dir)
    with pytest.raises(ValueError, match=f"being trained by process {os.getpid()} on"):
        train(tmp_path)
    lock.release()
    train(tmp_path)


def test_a_full_disk_is_one_line_and_loses_nothing_that_was_saved(tmp_path, monkeypatch):
    """safetensors tells it by an exception of its own, which used to end in a traceback."""
    message = "Error while serializing: I/O error: No space left on device (os error 28)"

    def full(tensors, path):
        raise SafetensorError(message)

    crash(tmp_path, 5)
    monkeypatch.setattr(ckpt, "save_file", full)
    with pytest.raises(TrainingError) as error:
        train(tmp_path)
    monkeypatch.undo()
    good = tmp_path / "tiny" / "checkpoints" / "step-0000004"
    assert str(error.value).startswith(
        f"disk full after step 8, in {tmp_path / 'tiny'}: a checkpoint takes 0.00 GiB, free are"
    )
    assert str(error.value).endswith(f"then the same command resumes from {good}")
    assert_same_run(train(tmp_path), train(tmp_path / "whole"))


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(tmp_path, monkeypatch):
    def denied(tensors, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ckpt, "save_file", denied)
    with pytest.raises(PermissionError):
        train(tmp_path)


# Steps, batches and gradients


def test_each_network_takes_its_own_number_of_steps(tmp_path):
    run = train(tmp_path)
    assert run.method.updates.count("student") == 4 and run.method.updates.count("fake_score") == 12
    state = everything(run)
    assert (
        state["student.optimizer/weight/step"] == 4
        and state["fake_score.optimizer/bias/step"] == 12
    )
    assert run.learners["student"].ema.updates == 4


def test_accumulation_equals_a_larger_batch(tmp_path):
    """accelerate's shared counter would never step the student here. A great eps and no clipping:
    the updates would otherwise not tell a sum of passes from their mean.
    """
    linear = [f"train.optimizers.{name}.eps=1" for name in ("student", "fake_score")]
    linear.append("train.optimizers.student.clip_norm=null")
    whole = train(tmp_path / "whole", "train.batch_size=4", *linear)
    halves = train(
        tmp_path / "halves",
        "train.optimizers.student.accumulate=2",
        "train.optimizers.fake_score.accumulate=2",
        *linear,
    )
    got, expected = everything(halves), everything(whole)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)
    got, expected = metrics_of(halves)[-1], metrics_of(whole)[-1]
    assert got["samples"] == expected["samples"] == 16 * 4
    assert got["fake_score/loss"] == pytest.approx(expected["fake_score/loss"], rel=1e-5)


def test_a_loss_in_parts_trains_as_in_one(tmp_path):
    """Each part is differentiated before the next is asked for."""
    whole, parted = train(tmp_path / "whole"), make_trainer(tmp_path / "parts")
    alive = []

    def losses(turn, batch, step):
        for share in (0.25, 0.75):
            loss, numbers = parted.method.loss(turn, batch, step)
            alive.append(any(p.grad is not None for p in parted.learners[turn].parameters.values()))
            yield share * loss, numbers

    parted.method.losses = losses
    parted.train()
    assert alive == len(alive) // 2 * [False, True]
    got, expected = everything(parted), everything(whole)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)
    assert metrics_of(parted)[-1]["fake_score/loss"] == pytest.approx(
        metrics_of(whole)[-1]["fake_score/loss"], rel=1e-5
    )


def test_checkpointing_reaches_networks_inside_others():
    """A discriminator on a transformer kept all its activations: 682 GiB where 25 will do."""
    torch.manual_seed(0)
    trunk = WanTransformer3DModel(**{**TINY_WAN, "num_layers": 3})
    disc = VideoDiscriminator(trunk)
    x, cond = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 5, 8)
    gradients = []
    for checkpointing in (False, True):
        switch_on({"discriminator": disc}, TrainConfig("x", gradient_checkpointing=checkpointing))
        assert trunk.is_gradient_checkpointing == checkpointing
        disc.zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            loss = disc(x, cond).sum()
        loss.backward()
        gradients.append((sum(saved), [p.grad for p in disc.parameters() if p.grad is not None]))
    (plain, expected), (few, got) = gradients
    assert few < 0.7 * plain  # what the heads and the embeddings keep is the same
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="no network of the objective supports it"):
        switch_on({"student": nn.Linear(2, 2)}, TrainConfig("x", gradient_checkpointing=True))


def test_a_repeated_turn_draws_anew(tmp_path):
    trainer = make_trainer(tmp_path, "train.max_steps=1")
    trainer.method.turns = lambda step: ("fake_score", "fake_score", "student")
    seen, draw = [], trainer.source.batch
    trainer.source.batch = lambda *key: seen.append(key) or draw(*key)
    trainer.train()
    assert seen == [
        (0, "fake_score", 0, range(2)),
        (0, "fake_score", 1, range(2)),
        (0, "student", 0, range(2)),
    ]


def test_clipping_bounds_the_whole_gradient(tmp_path):
    """With plain gradient steps of rate 1 the weights move by the clipped norm."""
    trainer = make_trainer(tmp_path, "train.max_steps=1", "train.log_every=1")
    learner = trainer.learners["student"]
    learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=1.0)
    learner.config.schedule, learner.config.warmup_steps, learner.config.lr = "constant", 0, 1.0
    before = nn.utils.parameters_to_vector(learner.parameters.values()).clone()
    trainer.train()
    moved = nn.utils.parameters_to_vector(learner.parameters.values()) - before
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert metrics_of(trainer)[0]["student/grad_norm"] > 1


def test_a_turn_leaves_gradients_only_where_it_updates(tmp_path):
    trainer = make_trainer(tmp_path)
    flags = []
    loss = trainer.method.loss

    def watched(turn, batch, step):
        flags.append(
            (turn, *(net.weight.requires_grad for net in trainer.method.networks().values()))
        )
        return loss(turn, batch, step)

    trainer.method.loss = watched
    trainer.train()
    assert set(flags) == {("student", True, False), ("fake_score", False, True)}
    parameters = [p for network in trainer.method.networks().values() for p in network.parameters()]
    assert all(p.requires_grad and p.grad is None for p in parameters)


def test_a_time_budget_ends_the_run_and_its_learning_rates(tmp_path, monkeypatch):
    """On a clock that moves by 0.1 s a step: 0.3 s are three steps of a million."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 0.1).__next__)
    monkeypatch.setattr(trainer_module, "time", clock)
    run = train(tmp_path, "train.max_minutes=0.005", "train.max_steps=1000000", "train.log_every=1")
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    assert run.step == 3 and lines[-1]["step"] == 3 and run.seconds == pytest.approx(0.3)
    assert [line["fake_score/lr"] for line in lines] == pytest.approx(
        [0.05, 0.05 * 2 / 3, 0.05 / 3]
    )
    assert list_checkpoints(run.checkpoints)[-1].name == "step-0000003"


def test_averaged_weights_for_the_export(tmp_path):
    run = train(tmp_path)
    own = run.method.student.weight.clone()
    with run.ema_weights("student"):
        assert torch.equal(run.method.student.weight, everything(run)["student.ema/weight"])
        assert not torch.equal(run.method.student.weight, own)
    assert torch.equal(run.method.student.weight, own)
    with pytest.raises(
        ValueError, match="network 'fake_score' has no moving average; set ema.fake_score.decay"
    ):
        run.ema_weights("fake_score")


def test_an_overflow_of_scaled_gradients_is_skipped_and_not_counted(tmp_path):
    """What fp16 does on a GPU: the scale halves until the gradient fits; clip, rate and average
    don't notice.
    """
    trainer = make_trainer(tmp_path, "train.log_every=1")
    for learner in trainer.learners.values():
        learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    weights = [trainer.method.fake_score.weight.clone()]
    trainer.method.after_step = lambda turn, step: (
        turn == "fake_score" and weights.append(trainer.method.fake_score.weight.clone())
    )
    trainer.train()
    learner, lines = trainer.learners["fake_score"], metrics_of(trainer)
    for before, after, line in zip(weights[:-1], weights[1:], lines, strict=True):
        assert torch.equal(before, after) == ("fake_score/loss" not in line)
    skipped = sum("fake_score/loss" not in line for line in lines)
    assert 1 <= skipped < 12 and learner.updates == 12 - skipped
    assert (
        learner.scaler.get_scale() == 2.0 ** (127 - skipped)
        and lines[-1]["fake_score/grad_norm"] < 100
    )


# Errors


def test_a_loss_that_is_not_a_number_stops_and_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError) as error:
        train(tmp_path, "knobs.nan_at=9")
    good = tmp_path / "tiny" / "checkpoints" / "step-0000008"
    assert (
        str(error.value)
        == "loss of turn 'student' is nan in step 10; training stopped, the last good checkpoint"
        f" is {good}"
    )
    assert list_checkpoints(good.parent)[-1] == good
    with pytest.raises(TrainingError, match="no checkpoint was written yet"):
        train(tmp_path / "other", "knobs.nan_at=0")


def test_what_a_run_was_resumed_from_is_not_called_good_after_a_nan(tmp_path):
    """The same command would resume from it and fail for ever; the message says how to get out."""
    with pytest.raises(TrainingError, match="the last good checkpoint is"):
        train(tmp_path, "knobs.nan_at=9")
    newest = tmp_path / "tiny" / "checkpoints" / "step-0000008"
    with pytest.raises(TrainingError) as error:
        train(tmp_path, "knobs.nan_at=9")
    way = (
        f"nothing was saved since it was resumed from {newest}; delete that folder to resume from"
        " step-0000004"
    )
    assert str(error.value) == f"loss of turn 'student' is nan in step 10; training stopped, {way}"


@pytest.mark.parametrize("file", ["student", "student.optimizer", "student.ema", "method"])
def test_a_number_that_is_none_is_not_saved(tmp_path, file):
    """A checkpoint with it would take the place of a good one."""
    train(tmp_path)
    resumed = make_trainer(tmp_path, "train.max_steps=13")
    kept = list_checkpoints(resumed.checkpoints)
    resumed.method.after_step = lambda turn, step: (
        turn == "student" and next(iter(resumed._tensors()[file].values())).fill_(float("inf"))
    )
    with pytest.raises(
        TrainingError, match=f" of {file} is not finite after step 13; it was not saved"
    ):
        resumed.train()
    assert list_checkpoints(resumed.checkpoints) == kept


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    """The square root has an infinite slope at 0 while the loss is finite."""
    trainer = make_trainer(tmp_path)
    trainer.method.loss = lambda turn, batch, step: (
        sum((p * 0).sum() for p in trainer.method.networks()[turn].parameters()).sqrt(),
        {},
    )
    with pytest.raises(TrainingError, match="gradient norm of turn 'fake_score' is nan in step 1"):
        trainer.train()


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "train.optimizers.studnet.lr=1",
            "optimizers.studnet is for no network .*; did you mean 'optimizers.student'",
        ),
        (
            "train.ema.fake.decay=0.9",
            "ema.fake is for no network of the objective; did you mean 'ema.fake_score'",
        ),
        (
            "train.optimizers.student=null",
            "network 'student' has no optimizer; set optimizers.student.lr",
        ),
        ("train.mixed_precision=fp16", "mixed_precision=fp16 needs a GPU"),
        ("train.gradient_checkpointing=true", "no network of the objective supports it"),
        ("train.compile=true", "no network of the objective supports it"),
        ("train.trackers=[wandb]", "tracker 'wandb' is not installed"),
        ("train.trackers=[wanbd]", "tracker .wanbd. is unknown; known are aim, "),
        ("train.name=a/b", "must be one folder name"),
        ("train.name=..", "must be one folder name"),
        ("train.name='a b'", "must be one folder name"),
        ("train.name=-rf", "must be one folder name"),
        ("train.name='<img src=x>'", "must be one folder name"),
        ("train.seed=-1", "seed=-1 must be from 0 to"),
        ("train.seed=4294967296", "seed=4294967296 must be from 0 to"),
        (
            "train.max_minutes=.inf",
            (
                "max_minutes: expected float or null, got float inf|max_minutes: expected float,"
                " got float inf"
            ),
        ),
        ("train.max_minutes=-1", "max_minutes=-1.0 must be above 0; use null"),
        ("train.optimizers.student.lr=1e400", "lr: expected float, got float inf"),
        (
            "train.optimizers.student.weight_decay=.nan",
            "weight_decay: expected float, got float nan",
        ),
        ("train.max_steps=0", "max_steps=0 must be at least 1"),
    ],
)
def test_what_can_not_be_trained_is_refused_at_construction(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, override)


def test_half_precision_parameters_are_refused(tmp_path):
    run = make_trainer(tmp_path)
    run.method.student.to(torch.bfloat16)
    with pytest.raises(ValueError, match="weight of network 'student' is torch.bfloat16"):
        Trainer(run.config, run.method, run.source)


def test_a_turn_of_no_network(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.method.turns = lambda step: ("critic",)
    with pytest.raises(
        ValueError, match="turn 'critic' is of no network; networks.. has student, fake_score"
    ):
        trainer.train()


def test_the_default_configuration_is_valid():
    assert TrainConfig(name="x").optimizers == {}


# Processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate launches CUDA processes itself")
@pytest.mark.slow
def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    """`accelerate launch --cpu --num_processes 2` used to start one process; decisions and weights
    agree.
    """
    launcher = [*ACCELERATE, "launch", "--cpu", "--num_processes", "2"]
    command = [*launcher, str(SCRIPT), str(tmp_path / "two"), "train.batch_size=1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one = train(tmp_path / "one", "train.batch_size=2")
    two = tmp_path / "two" / "tiny"
    for rank in (0, 1):
        seen = json.loads((two / f"seen-{rank}.json").read_text())
        assert seen == {"decisions": one.method.decisions, "processes": 2}
    for got, expected in zip(read_metrics(two / "metrics.jsonl"), metrics_of(one), strict=True):
        got.pop("seconds")
        assert got == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="train.batch_size was 1, now 2"):
        train(tmp_path / "two", "train.batch_size=2")
    with pytest.raises(ValueError, match="was trained with 2 processes, not 1"):
        train(tmp_path / "two", "train.batch_size=1")
    names = list(one._tensors())
    saved = read_checkpoint(list_checkpoints(two / "checkpoints")[-1], names, 1).tensors
    for name, expected in everything(one).items():
        file, _, key = name.partition("/")
        torch.testing.assert_close(saved[file][key], expected, rtol=0, atol=1e-6)
