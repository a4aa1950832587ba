"""Threads of a CPU computation wait asleep, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

from streamvid.threads import physical_cores, set_thread_defaults


def test_what_the_environment_says_stays():
    given = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3", "HOME": "/root"}
    environment = dict(given)
    set_thread_defaults(environment)
    assert environment == {**given, "KMP_BLOCKTIME": "0"}
    set_thread_defaults(empty := {})
    assert empty["OMP_WAIT_POLICY"] == "PASSIVE" and int(empty["OMP_NUM_THREADS"]) >= 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="as Linux tells it")
def test_threads_of_one_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / str(cpu)).write_text(siblings)
    assert physical_cores(f"{tmp_path}/{{}}") == 2
    assert physical_cores(f"{tmp_path}/absent{{}}") == 4


def test_a_command_sets_it_before_torch_is_loaded():
    code = (
        "import os, sys\n"
        "from streamvid.cli.__main__ import main\n"
        "assert 'torch' not in sys.modules\n"
        "main(['--version'])\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['OMP_NUM_THREADS'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"PASSIVE {physical_cores()}"
