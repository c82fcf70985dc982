"""When torchrun was started, asked by a process that it started, whatever stands between them."""

import math
import subprocess
import sys

import pytest

INNER = "from m3bind.parallel.world import _start_of_agent; print(_start_of_agent())"
# What torchrun is to its ranks: a process without the variable that it gives to them.
OUTER = f"""
import os, psutil, subprocess, sys
print(psutil.Process().create_time(), flush=True)
command = [sys.executable, "-c", {INNER!r}]
for shell in range(int(sys.argv[1])):  # a shell that stays beside what it starts
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
subprocess.run(command, env=os.environ | {{"TORCHELASTIC_RUN_ID": "none"}}, check=True)
"""


@pytest.mark.parametrize("scripts", (0, 1, 2))
def test_scripts_between(monkeypatch, scripts):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", OUTER, str(scripts)], capture_output=True, text=True, check=True
    )
    started, found = map(float, done.stdout.split())
    assert found == started


def test_without_torchrun(monkeypatch):
    from m3bind.parallel.world import _start_of_agent

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert _start_of_agent() == math.inf
