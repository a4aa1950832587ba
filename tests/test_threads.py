"""Threads of a CPU computation wait asleep, unless the environment says otherwise."""

import os
import subprocess
import sys

from streamvid.threads import set_thread_defaults


def test_what_the_environment_says_stays():
    given = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3", "HOME": "/root"}
    environment = dict(given)
    set_thread_defaults(environment)
    assert environment == {**given, "KMP_BLOCKTIME": "0"}
    set_thread_defaults(empty := {})
    assert empty == {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # nothing of how many


def test_a_command_sets_it_before_torch_is_loaded():
    code = (
        "import os, sys\n"
        "from streamvid.cli.__main__ import main\n"
        "assert 'torch' not in sys.modules\n"
        "main(['--version'])\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "PASSIVE"
