"""How the processes of a training start and end: their launcher, their number, and the lock that
keeps another run out.

Nothing here imports torch, so that a process that is about to be replaced, or to be told of its
launcher's death, need not wait for it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import signal
import socket
import sys
import weakref
from argparse import Namespace
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
LAUNCHER_SETTINGS = {  # of accelerate launch, by the variable that it sets: what does it here
    "ACCELERATE_USE_FSDP": ("--use_fsdp", "train.shard=full"),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "train.shard=full"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "train.shard=full"),
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", "train.compile=true"),
}


def launch_all_processes() -> None:
    """What a training script calls first: all processes that were asked for are started, and end
    with their launcher.

    accelerate 1.15 starts a single one for `accelerate launch --cpu --num_processes N script.py`
    and says nothing; then this process is replaced by `torchrun --nproc_per_node N script.py`.

    Raises:
        ValueError: one line, for what the launcher was asked and can't be had that way.
    """
    stop_with_launcher()
    count = _count_missing_processes()
    if count <= 1:
        return
    port = os.environ.pop("MASTER_PORT")
    os.environ.pop("MASTER_ADDR")
    arguments = ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    arguments += ["--master_port", port] if port != "29500" else ["--standalone"]
    os.execv(sys.executable, [sys.executable, *arguments, *_program(), *sys.argv[1:]])


def _program() -> list[str]:
    """What this process runs, a script or a module, in words that `torchrun` takes."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["--module", spec.name] if spec is not None else [sys.argv[0]]


def stop_with_launcher() -> None:
    """Asks for SIGTERM when `accelerate launch` or `torchrun` ends, which leave what they started
    to itself when killed.

    A shell is no launcher: what it started in the background goes on without it. Only Linux can do
    this.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)  # what replaces this process keeps it
    if os.getppid() != launcher:  # it ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def _count_missing_processes() -> int:
    """How many processes `accelerate launch --cpu` was asked for, 0 if it did not start this one
    alone.

    It leaves MASTER_PORT but no rank behind, and the number only on its own command line.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 0
    arguments = _launcher_arguments()
    if arguments is not None and (arguments.gradient_accumulation_steps or 1) != 1:
        steps = arguments.gradient_accumulation_steps
        raise ValueError(
            f"accelerate launch --gradient_accumulation_steps {steps} does nothing here; leave it"
            f" out and set train.optimizers.NAME.accumulate={steps} for each network"
        )
    if "MASTER_PORT" not in os.environ or "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        return 0
    if arguments is None:
        raise ValueError(
            "accelerate was asked for several CPU processes but started one; "
            "start them with `torchrun --nproc_per_node N` instead"
        )
    if arguments.num_machines not in (None, 1):
        raise ValueError(
            "accelerate launch --cpu starts one process a machine; use torchrun for several"
            " machines"
        )
    if arguments.num_processes is None and arguments.config_file is not None:
        from accelerate.commands.config.config_args import load_config_from_file

        return load_config_from_file(arguments.config_file).num_processes
    return arguments.num_processes or 0


def _launcher_arguments() -> Namespace | None:
    """What `accelerate launch` was called with, if it is what started this process."""
    import psutil  # accelerate depends on it
    from accelerate.commands.launch import launch_command_parser

    # accelerate launch | accelerate-launch | -m ....launch
    command = psutil.Process(os.getppid()).cmdline()
    launchers = [
        i for i, word in enumerate(command) if Path(word).stem in ("launch", "accelerate-launch")
    ]
    if not launchers:
        return None
    return launch_command_parser().parse_known_args(command[launchers[0] + 1 :])[0]


def check_launcher(mixed_precision: str) -> None:
    """The run file says how to train; a launcher that says otherwise is not heard, so it must not
    be asked.

    Raises:
        ValueError: one line, with the setting that does it.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed_precision):
        raise ValueError(
            f"accelerate launch was asked for --mixed_precision {asked}, on its command line or in"
            f" its configuration file, and the run for train.mixed_precision={mixed_precision}; set"
            " both to the same, or leave the launcher's out"
        )
    for variable, (option, setting) in LAUNCHER_SETTINGS.items():
        if os.environ.get(variable, "no").lower() not in ("no", "false", "0", ""):
            raise ValueError(
                f"accelerate launch {option} does nothing here; leave it out and set {setting}"
            )


def count_processes() -> int:
    """How many processes `torchrun` or `accelerate launch` has started, also before they know each
    other.
    """
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is the one that writes, also before the processes know each other."""
    return os.environ.get("RANK", "0") == "0"


class RunLock:
    """One run, one writer: a lock on a run folder, held until `release` or until the process ends,
    however it does.

    The main process of a launch holds it for all.
    """

    def __init__(self, run_dir: Path) -> None:
        """Raises ValueError with one line if another process trains this run, OSError if nothing
        can be written there.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        self.release: Any = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
            self.release()
            raise ValueError(
                f"{run_dir}: this run is being trained by {owner}; wait for it or stop it, or give"
                " this run another train.name"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            log.warning(
                "%s is on a disk without locks; see to it that nobody else trains this run", run_dir
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
