"""clip_loss on two threads beside one, and how much faster the bare GEMMs get by it."""

import os
from functools import cache, partial

import pytest
import torch
from clip_contestants import contestant
from rows import report
from turns import CHOSEN_DTYPES, FEATURES, SIZES, Contestant, NotRun, Taken, in_turns

N = max(SIZES)
DTYPES = [dtype for dtype in CHOSEN_DTYPES if dtype != "fp16"]
CONTESTANTS = {
    "1 thread": ("m3bind", 1),
    "2 threads": ("m3bind", 2),
    "floor, 1 thread": ("floor", 1),
    "floor, 2 threads": ("floor", 2),
}


def on_threads(name: str, threads: int, dtype: str) -> Contestant:
    if threads > len(os.sched_getaffinity(0)):
        raise NotRun(f"needs {threads} cores")
    torch.set_num_threads(threads)  # the floor chooses its panels on as many
    made = contestant(name, N, dtype)

    def run():
        torch.set_num_threads(threads)
        return made.run()

    return Contestant(run=run, setting=made.setting)


@cache
def turns(dtype: str) -> dict[str, Taken]:
    return in_turns(
        {name: partial(on_threads, *one, dtype) for name, one in CONTESTANTS.items()}
    )  # fmt: skip


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_loss_on_two_threads(benchmark, name, dtype):
    report(
        benchmark, f"clip_loss {dtype} on threads N={N} D={FEATURES}", name, turns(dtype)[name],
        op="clip_loss", kind="threads", dtype=dtype, n=N, threads=CONTESTANTS[name][1],
    )  # fmt: skip
