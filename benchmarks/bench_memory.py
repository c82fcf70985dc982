"""Memory of one cold call of clip_loss, forward and backward, each contestant in a fresh process.

M3BIND_BENCH_LARGE adds a batch (65536: minutes) that only O(N + M) memory can hold, in fp32 on two
threads, beside the floor.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clip_contestants import OURS, PEERS
from rows import report
from turns import CHOSEN_DTYPES, FEATURES, SIZES, THREADS, NotRun, Taken, problem

N = max(SIZES)
LARGE = int(os.environ.get("M3BIND_BENCH_LARGE", "0"))
LARGE_THREADS = 2
DTYPES = [dtype for dtype in CHOSEN_DTYPES if dtype != "fp16"]


def cold(name: str, dtype: str, n: int, threads: int) -> tuple[Taken, dict[str, float]]:
    script = Path(__file__).with_name("cold.py")
    command = [sys.executable, str(script), name, dtype, str(n), str(threads)]
    try:
        if threads > len(os.sched_getaffinity(0)):
            raise NotRun(f"needs {threads} cores")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode < 0:
            raise RuntimeError(f"killed by signal {-done.returncode}")
        if done.returncode:
            kind, _, reason = done.stderr.strip().splitlines()[-1].partition(": ")
            raise (NotRun if kind == "turns.NotRun" else RuntimeError)(reason or kind)
    except Exception as error:
        return Taken(problem=problem(error)), {}
    found = json.loads(done.stdout)
    return Taken(found.pop("setting"), [found.pop("seconds")]), found


def cold_row(benchmark, group: str, name: str, dtype: str, n: int, threads: int) -> None:
    taken, found = cold(name, dtype, n, threads)
    report(
        benchmark, f"clip_loss {dtype} {group} N={n} D={FEATURES}", name, taken,
        op="clip_loss", kind="memory", dtype=dtype, n=n, threads=threads, **found,
    )  # fmt: skip


@pytest.mark.parametrize("name", (*OURS, *PEERS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_loss_cold_memory(benchmark, name, dtype):
    cold_row(benchmark, "memory of a cold call", name, dtype, N, THREADS)


@pytest.mark.skipif(not LARGE, reason="minutes: M3BIND_BENCH_LARGE=65536 runs it")
@pytest.mark.parametrize("name", ["m3bind", "floor"])
def test_clip_loss_large(benchmark, name):
    cold_row(benchmark, "one cold call, two threads", name, "fp32", LARGE, LARGE_THREADS)
