"""clip_loss over two gloo ranks: ours beside open_clip's ClipLoss, same batch, in turns.

Time, bytes that a rank sends, and the peak memory of a rank; M3BIND_BENCH_SIZES are rows a rank.
Both ranks run on this machine: it needs two cores, and the transport is its memory.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from over_ranks import CONTESTANTS, WORLD
from rows import report
from turns import CHOSEN_DTYPES, FEATURES, SECONDS, SIZES, NotRun, Taken, ours, problem

DTYPES = [dtype for dtype in CHOSEN_DTYPES if dtype != "fp16"]


@functools.cache
def ran(kind: str, dtype: str, rows: int, last: str) -> dict:
    script = Path(__file__).with_name("over_ranks.py")
    command = [sys.executable, str(script), kind, dtype, str(rows), last]
    try:
        if len(os.sched_getaffinity(0)) < WORLD:
            raise NotRun(f"needs {WORLD} cores")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return json.loads(done.stdout)
    except Exception as error:
        return {"problem": problem(error)}


def row(benchmark, kind: str, group: str, name: str, dtype: str, rows: int, last: str) -> None:
    found = ran(kind, dtype, rows, last)
    setting = CONTESTANTS[name][1]
    if name.startswith("m3bind"):
        setting += f", {ours('clip_loss', dtype)}"
    facts = dict(found.get(name, {}))
    taken = Taken(setting, facts.pop("seconds", []), found.get("problem", ""))
    report(
        benchmark, f"clip_loss {dtype} {group} W={WORLD} b={rows} D={FEATURES}", name, taken,
        op="clip_loss", kind=group, dtype=dtype, n=rows, ranks=WORLD, **facts,
    )  # fmt: skip


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distributed(benchmark, name, rows, dtype):
    row(benchmark, "turns", "over ranks", name, dtype, rows, str(SECONDS))


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distributed_memory(benchmark, name, dtype):
    row(benchmark, "cold", "memory over ranks", name, dtype, max(SIZES), name)
