"""The training loop: one for all methods.

A step runs the method's turns in order; a turn averages the gradient of one network over its
accumulation passes and all processes, clips it, and updates the network and its moving average.
accelerate gives the launch, the device, the precision and the trackers. Gradient accumulation and
learning rates are ours, because accelerate's one counter starves one of two alternating optimisers
and its schedulers step once a process.

A run is a function of its configuration: batches and decisions are keyed, so that stopping and
resuming changes nothing, bit for bit. The exception is `max_minutes`, which ties learning rates and
the end to the clock.

The run folder: `config.yaml`, `metrics.jsonl`, `checkpoints/step-0000123/` and what `save_fn`
exports. One process, for all of its launch, holds the lock on it while it trains and exports.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, gather_object, send_to_device, set_seed
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from streamvid.config import flatten, save_config, to_plain
from streamvid.files import disk_full, remove_leftovers
from streamvid.metering import GIB
from streamvid.training import checkpoint as ckpt
from streamvid.training.checks import check_names, check_same_run, check_trackers, fingerprint
from streamvid.training.config import TrainConfig
from streamvid.training.launch import RunLock, check_launcher
from streamvid.training.learner import Learner
from streamvid.training.method import BatchSource, Method, loss_parts
from streamvid.training.metrics import RunningMeans, append_metrics, trim_metrics
from streamvid.training.optimizers import load_optimizer_tensors, optimizer_tensors
from streamvid.training.processes import (
    StopSignals,
    agree_on_largest,
    average_gradients,
    average_loss,
    broadcast_tensors,
    start_accelerator,
)
from streamvid.training.sharding import (
    check_shardable,
    find_networks,
    gather_tensors,
    is_sharded,
    shard_networks,
    whole_network,
)
from streamvid.weights import not_finite

log = logging.getLogger(__name__)


class TrainingError(ValueError):
    """Training can't go on, such as after a loss that is not a number. The message is one line for
    the user.
    """


class Trainer:
    """Trains the networks of a method on a source of batches.

    save_fn: called with the run folder, in every process, when training has ended, to export what
    it made; the main process writes. resolved: the configuration to keep with the run and to
    compare on resume; `config`, or a dataclass with it in one of its fields. progress: whether a
    terminal gets a progress bar. lock: of the run folder, where the main process holds it already;
    it is released when training has ended.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        source: BatchSource,
        save_fn: Callable[[Path], Any] | None = None,
        resolved: Any = None,
        progress: bool = True,
        lock: RunLock | None = None,
    ) -> None:
        self.config = config
        self.method = method
        self.source = source
        self.save_fn = save_fn
        self.lock = lock
        self.resolved = config if resolved is None else resolved
        self.run_dir = Path(config.output_dir) / config.name
        self.checkpoints = self.run_dir / "checkpoints"
        networks = method.networks()
        check_names(config, networks)
        check_trackers(config.trackers)
        check_launcher(config.mixed_precision)
        self.accelerator = start_accelerator(
            config.mixed_precision, config.trackers, str(self.run_dir)
        )
        self.sharded = config.shard == "full" and self.accelerator.num_processes > 1
        for network in networks.values():
            network.train()
            if not self.sharded:
                network.to(self.accelerator.device)
        switch_on(networks, config)
        if config.shard == "full":
            kinds = {name: config.optimizers[name].kind for name in networks}
            check_shardable(method, kinds, config.mixed_precision, config.compile)
        if self.sharded:
            shard_networks(find_networks(method).values(), self.accelerator.device)
        self.learners = {
            name: Learner(
                name,
                network,
                config.optimizers[name],
                config.ema.get(name),
                config.mixed_precision == "fp16",
            )
            for name, network in networks.items()
        }
        self.means = RunningMeans()
        self.show_progress = progress
        self.step = 0
        self.samples = 0
        self.seconds = 0.0
        self.resumed_from: Path | None = None
        for tensors in self._tensors().values():
            broadcast_tensors(tensor for tensor in tensors.values() if not is_sharded(tensor))

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1]: by steps, or by the clock where that is
        further.
        """
        by_time = self.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return min(1.0, max(self.step / self.config.max_steps, by_time))

    def ema_weights(self, name: str) -> AbstractContextManager[None]:
        """Inside the block the network has its averaged weights."""
        ema = self.learners[name].ema
        if ema is None:
            raise ValueError(
                f"network '{name}' has no moving average; set ema.{name}.decay=0.99 to keep one"
            )
        return ema.weights()

    def whole(self, name: str) -> Module | None:
        """A network as it can be saved, with the weights it has now. All processes must call; None
        where another writes.
        """
        return whole_network(self.learners[name].network, self.is_main)

    def train(self) -> Path:
        """Trains to the end, from the newest checkpoint of the run if there is one; returns the run
        folder.

        Raises TrainingError when the loss, a gradient or a weight is not finite or the disk is
        full, ValueError when the run folder does not fit or another process trains this run, and
        SystemExit with 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP.
        """
        if self.is_main and self.lock is None:
            self.lock = RunLock(self.run_dir)
        try:
            self._train_and_export()
        except (OSError, SafetensorError) as error:
            reason = disk_full(error)
            if reason is None:
                raise
            raise TrainingError(self._no_room(reason)) from None
        finally:
            if self.lock is not None:
                self.lock.release()
                self.lock = None
        return self.run_dir

    def _train_and_export(self) -> None:
        self._open_run_dir()
        self._resume()
        try:
            with StopSignals() as signals, self._progress_bar() as bar:
                self._loop(signals, bar)
        except KeyboardInterrupt:
            self._say(f"step {self.step + 1} abandoned; {self._how_to_resume()}")
            raise SystemExit(128 + signal.SIGINT) from None
        finally:
            self._require_gradients_of(self.learners)
        if self.save_fn is not None:
            self.save_fn(self.run_dir)
        self.accelerator.end_training()

    # The loop

    def _loop(self, signals: StopSignals, bar: tqdm) -> None:
        started, steps_before, seconds_before = time.monotonic(), self.step, self.seconds
        while self.progress < 1:
            self._run_step()
            elapsed = seconds_before + time.monotonic() - started
            self.step += 1
            received, self.seconds = agree_on_largest(
                [signals.received, elapsed], self.accelerator.device
            )
            if self.step % self.config.log_every == 0 or self.progress == 1:
                pace = (self.seconds - seconds_before) / (self.step - steps_before)
                self._log(bar, pace)
            bar.update(1)
            if self.step % self.config.save_every == 0 or self.progress == 1 or received:
                self._save()
            if received and self.progress < 1:
                self._say(
                    f"stopped by {signal.Signals(int(received)).name}; {self._how_to_resume()}"
                )
                raise SystemExit(128 + int(received))

    def _run_step(self) -> None:
        seen: Counter[str] = Counter()
        if hasattr(self.method, "set_progress"):
            self.method.set_progress(self.progress)
        for turn in self.method.turns(self.step):
            if turn not in self.learners:
                raise ValueError(
                    f"turn '{turn}' is of no network; networks() has {', '.join(self.learners)}"
                )
            self._run_turn(turn, seen[turn])
            seen[turn] += 1

    def _run_turn(self, turn: str, micro: int) -> None:
        """Updates one network with one joint batch."""
        learner = self.learners[turn]
        self._require_gradients_of([turn])
        learner.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(learner.config.accumulate):
            total = total + self._backward(learner, turn, micro, part)
        if self.sharded:  # gradients are averaged as they are made
            loss = average_loss(total).item()
        else:
            loss = average_gradients(list(learner.parameters.values()), total).item()
        self._check_finite("loss", loss, turn)
        learner.scaler.unscale_(learner.optimizer)
        norm = learner.clip()
        if not self._skip_overflow(learner, norm, turn):
            lr = learner.update(self.progress)
            self.means.add({f"{turn}/loss": loss, f"{turn}/grad_norm": norm, f"{turn}/lr": lr})
        learner.optimizer.zero_grad(set_to_none=True)
        if hasattr(self.method, "after_step"):
            self.method.after_step(turn, self.step)

    def _backward(self, learner: Learner, turn: str, micro: int, part: int) -> Tensor:
        """Adds the gradient of one batch; returns its share of the loss."""
        batch = self._draw(turn, micro, part)
        parts = loss_parts(self.method, turn, batch, self.step)
        total = torch.zeros((), device=self.accelerator.device)
        while True:
            with self._autocast():
                found = next(parts, None)
            if found is None:
                return total
            loss, numbers = found
            loss = loss / learner.config.accumulate
            learner.scaler.scale(loss).backward()
            self.means.add({f"{turn}/{name}": value for name, value in numbers.items()})
            total = total + loss.detach()

    def _autocast(self) -> Any:
        """accelerate's context of mixed precision. It keeps no casts of sharded weights: they would
        stay whole until the loss is computed, 27 GiB at 14B.
        """
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=not self.sharded))

    def _draw(self, turn: str, micro: int, part: int) -> dict[str, Any]:
        """This process's share of the joint batch in accumulation pass `part`."""
        size, processes = self.config.batch_size, self.accelerator.num_processes
        first = (part * processes + self.accelerator.process_index) * size
        batch = self.source.batch(self.step, turn, micro, range(first, first + size))
        self.samples += size * processes
        return send_to_device(batch, self.accelerator.device) | {"micro": micro}

    def _require_gradients_of(self, names: Any) -> None:
        """Only these networks require gradients: others cost neither memory nor time, and gather
        nothing.
        """
        for learner in self.learners.values():
            for parameter in learner.parameters.values():
                parameter.requires_grad_(False)
        for name in names:
            for parameter in self.learners[name].parameters.values():
                parameter.requires_grad_(True)

    def _check_finite(self, what: str, value: float, turn: str) -> None:
        if math.isfinite(value):
            return
        raise TrainingError(
            f"{what} of turn '{turn}' is {value} in step {self.step + 1}; training stopped,"
            f" {self._where_to_go_on()}"
        )

    def _where_to_go_on(self) -> str:
        """After a number that is none. What a run was resumed from may be the cause, and would be
        so again.
        """
        newest = ckpt.list_checkpoints(self.checkpoints)
        if not newest:
            return "no checkpoint was written yet"
        if newest[-1] == self.resumed_from:
            return (
                f"nothing was saved since it was resumed from {newest[-1]};"
                f" {ckpt.way_back(newest[-1])}"
            )
        return f"the last good checkpoint is {newest[-1]}"

    def _skip_overflow(self, learner: Learner, norm: float, turn: str) -> bool:
        """fp16 gradients overflow now and then: the scale goes down and the update is left out."""
        if math.isfinite(norm) or not learner.scaler.is_enabled() or learner.scaler.get_scale() < 1:
            self._check_finite("gradient norm", norm, turn)
            return False
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        return True

    # Logging

    @contextmanager
    def _progress_bar(self) -> Iterator[tqdm]:
        visible = self.show_progress and self.is_main and sys.stderr.isatty()
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        with tqdm(
            total=self.config.max_steps,
            initial=self.step,
            desc=self.config.name,
            disable=not visible,
            bar_format=form,
            dynamic_ncols=True,
        ) as bar:
            yield bar

    def _log(self, bar: tqdm, pace: float) -> None:
        """One line of metrics; `pace` is the mean time of a step in this session, in seconds."""
        means = self.means.take()
        if not self.is_main:
            return
        line = {
            "step": self.step,
            **means,
            "seconds": round(self.seconds, 3),
            "samples": self.samples,
        }
        append_metrics(self.run_dir / "metrics.jsonl", line)
        self.accelerator.log(means, step=self.step)
        losses = "  ".join(
            f"{key} {value:.4g}" for key, value in means.items() if key.endswith("/loss")
        )
        eta = tqdm.format_interval(self._seconds_left(pace))
        bar.set_postfix_str(f"eta {eta}, {losses}", refresh=False)
        log.info("step %d of %d  eta %s  %s", self.step, self.config.max_steps, eta, losses)

    def _seconds_left(self, pace: float) -> float:
        by_steps = (self.config.max_steps - self.step) * pace
        budget = math.inf if self.config.max_minutes is None else 60 * self.config.max_minutes
        return max(0.0, min(by_steps, budget - self.seconds))

    def _say(self, text: str) -> None:
        if self.is_main:
            with suppress(OSError):  # the terminal may be gone
                print(f"{self.config.name}: {text}", file=sys.stderr, flush=True)

    def _how_to_resume(self) -> str:
        newest = ckpt.list_checkpoints(self.checkpoints)
        if not newest:
            return "no checkpoint was written yet, the same command starts anew"
        return f"the same command resumes from {newest[-1]}"

    def _no_room(self, reason: str) -> str:
        tensors = [tensor for named in self._tensors().values() for tensor in named.values()]
        needed = sum(tensor.nbytes for tensor in tensors) / GIB
        there = shutil.disk_usage(self.run_dir).free / GIB
        remedy = (
            f"free {needed - there:.2f} GiB or more"
            if needed > there
            else "make room or raise the limit"
        )
        return (
            f"{reason} after step {self.step}, in {self.run_dir}: a checkpoint takes {needed:.2f}"
            f" GiB, free are {there:.2f}; {remedy}, then {self._how_to_resume()}"
        )

    # The run folder

    def _open_run_dir(self) -> None:
        """Refuses a folder of a run with another configuration; writes this one."""
        check_same_run(self.run_dir / "config.yaml", self.config, self.resolved)
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.checkpoints)
            remove_leftovers(self.run_dir)
            save_config(self.resolved, self.run_dir / "config.yaml")
        self.accelerator.wait_for_everyone()
        if self.config.trackers:
            settings = {key: str(value) for key, value in flatten(to_plain(self.resolved)).items()}
            self.accelerator.init_trackers(self.config.name, config=settings)

    def _save(self) -> None:
        own = {
            "random": ckpt.random_state(self.accelerator.device),
            "means": self.means.state_dict(),
        }
        ranks = gather_object([own])
        tensors = {
            file: gather_tensors(live, self.is_main) for file, live in self._tensors().items()
        }
        if self.is_main:
            self._check_weights(tensors)
            snapshot = ckpt.Snapshot(self._counters(), tensors, ranks)
            ckpt.write_checkpoint(
                self.checkpoints, self.step, snapshot, self.config.keep_checkpoints
            )
        self.accelerator.wait_for_everyone()

    def _check_weights(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """The checkpoints that are there are better than one that can't be resumed from."""
        for file, named in tensors.items():
            bad = not_finite(named)
            if bad is not None:
                what = (
                    f"{bad} of {file} is not finite after step {self.step}; it was not saved,"
                    " training stopped"
                )
                raise TrainingError(f"{what}, {self._where_to_go_on()}")

    def _counters(self) -> dict[str, Any]:
        return {
            "run": fingerprint(self.config, self.resolved),
            "data": getattr(self.source, "fingerprint", None),
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "num_processes": self.accelerator.num_processes,
            "updates": {name: learner.updates for name, learner in self.learners.items()},
            "scalers": {
                name: learner.scaler.state_dict() for name, learner in self.learners.items()
            },
        }

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything of the run that is a tensor, by the name of the file that it is saved in."""
        tensors = {}
        for name, learner in self.learners.items():
            tensors[name] = learner.network.state_dict()
            tensors[f"{name}.optimizer"] = optimizer_tensors(learner.optimizer, learner.names)
            if learner.ema is not None:
                tensors[f"{name}.ema"] = learner.ema.state_dict()
        if hasattr(self.method, "extra_state"):
            tensors["method"] = self.method.extra_state()
        return tensors

    def _resume(self) -> None:
        """Continues from the newest checkpoint, or starts with the seed."""
        newest = ckpt.list_checkpoints(self.checkpoints)
        if newest:
            self._load(newest[-1])
        else:
            set_seed(self.config.seed, device_specific=True)
        if self.is_main:
            trim_metrics(self.run_dir / "metrics.jsonl", self.step)
        self.accelerator.wait_for_everyone()

    def _load(self, path: Path) -> None:
        live, counters = self._tensors(), ckpt.read_counters(path)
        self._check_of_this_run(path, counters)
        saved = ckpt.read_checkpoint(
            path, list(live), self.accelerator.process_index, verify=self.is_main
        )
        for name, learner in self.learners.items():
            file = f"{name}.optimizer"
            live.pop(file)
            ckpt.check_finite(saved.tensors[file], path, file)
            with ckpt.reading(path, f"{file}.safetensors"):
                load_optimizer_tensors(learner.optimizer, learner.names, saved.tensors.pop(file))
        for name, tensors in live.items():
            ckpt.restore_tensors(tensors, saved.tensors[name], path, name)
        with ckpt.reading(path, ckpt.COUNTERS_FILE):
            self._set_counters(saved.counters)
        with ckpt.reading(path, f"rank-{self.accelerator.process_index}.pt"):
            self.means.load_state_dict(saved.ranks[0]["means"])
            self.resumed_from = path
            self._say(f"resumed from {path}")
            ckpt.restore_random_state(saved.ranks[0]["random"], self.accelerator.device)

    def _check_of_this_run(self, path: Path, counters: dict[str, Any]) -> None:
        processes, before = self.accelerator.num_processes, counters.get("num_processes")
        if counters.get("run") != fingerprint(self.config, self.resolved):
            raise ckpt.DamagedCheckpoint(path, "it is of a run with another configuration")
        was, now = counters.get("data"), getattr(self.source, "fingerprint", None)
        if was and now and was != now:
            raise ValueError(
                f"the data of run {self.run_dir} has changed since it was saved (prompts, captions"
                " or clips); put it back, or give the run another name"
            )
        if before != processes:
            raise ValueError(
                f"run {self.run_dir} was trained with {before} processes, not {processes}, which"
                " changes its batches; launch as many again, or give the run another name"
            )

    def _set_counters(self, counters: dict[str, Any]) -> None:
        """Undoes `_counters`."""
        self.step = counters["step"]
        self.samples = counters["samples"]
        self.seconds = counters["seconds"]
        for name, learner in self.learners.items():
            learner.scaler.load_state_dict(counters["scalers"][name])
            learner.updates = counters["updates"][name]
            if learner.ema is not None:
                learner.ema.updates = learner.updates


def switch_on(networks: dict[str, Module], config: TrainConfig) -> None:
    """Activation checkpointing and compilation for the networks that can; the former also where
    such a one is inside.
    """
    modules = [module for network in networks.values() for module in network.modules()]
    recomputing = [m for m in modules if getattr(m, "_supports_gradient_checkpointing", False)]
    repeating = [n for n in networks.values() if getattr(n, "_repeated_blocks", None)]
    if config.gradient_checkpointing:
        for network in _some(recomputing, "gradient_checkpointing"):
            network.enable_gradient_checkpointing()
    if config.compile:
        for network in _some(repeating, "compile"):
            network.compile_repeated_blocks()


def _some(networks: list[Any], option: str) -> list[Any]:
    if not networks:
        raise ValueError(
            f"{option}=true, but no network of the objective supports it; set it to false"
        )
    return networks
