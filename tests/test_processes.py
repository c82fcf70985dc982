"""Workers end with the process they work for."""

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import os, sys, time
from m3bind.processes import spawned_pool

if __name__ == "__main__":
    pool = spawned_pool(1)
    print(pool.submit(os.getpid).result(), flush=True)
    if sys.argv[1] == "busy":
        pool.submit(time.sleep, 600)
        time.sleep(1)
    print("ready", flush=True)
    time.sleep(600)
"""


INTERRUPTED = """
import sys, time
from m3bind.processes import spawned_pool

if __name__ == "__main__":
    pool = spawned_pool(2, ignore_interrupt=True)
    jobs = [pool.submit(time.sleep, 1) for _ in range(2)]
    print("ready", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pool.shutdown()
        print([job.result() for job in jobs], flush=True)
"""


def test_ctrl_c_is_left_to_the_parent(tmp_path):
    """Also while the workers start, which takes seconds of imports."""
    script = tmp_path / "parent.py"
    script.write_text(INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.3)
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
        out, errors = parent.communicate(timeout=60)
    assert (out, errors) == ("[None, None]\n", "")


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("state", "signal_number"), [
    ("idle", signal.SIGTERM), ("busy", signal.SIGKILL),
    pytest.param("idle", signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param("busy", signal.SIGTERM, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_worker_ends_when_its_parent_is_killed(tmp_path, state, signal_number):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        assert _lives(worker)
        os.kill(parent.pid, signal_number)
        parent.wait(timeout=10)
    deadline = time.monotonic() + 10
    while _lives(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(worker)
