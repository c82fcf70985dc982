"""Contestants that take turns in one process, and the row of results that each gets.

pytest-benchmark's own columns run one contestant after the other, so a machine that changes its
clock favours one of them. The numbers to compare are those in `extra_info`, of rounds in which all
take turns. M3BIND_BENCH_THREADS and M3BIND_BENCH_SIZES choose threads (1) and batches.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind import backends

ROUNDS = 5
THREADS = int(os.environ.get("M3BIND_BENCH_THREADS", "1"))
SIZES = tuple(int(n) for n in os.environ.get("M3BIND_BENCH_SIZES", "1024,4096").split(","))
FEATURES = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Run = Callable[[], Any]


def timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Run], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of every contestant, taken in turns after two warm-up calls each."""
    for run in runs.values():
        run()
        run()
    taken = [{name: timed(run) for name, run in runs.items()} for _ in range(rounds)]
    return {name: [seconds[name] for seconds in taken] for name in runs}


def record(
    benchmark: Any, name: str, turns: Mapping[str, list[float]], *, op: str, dtype: str = "fp32",
    flop: int, against: str = "floor",
) -> None:  # fmt: skip
    """Puts what was found in turns, and of what, into the row of one contestant."""
    best = {key: min(seconds) for key, seconds in turns.items()}
    chosen = backends.resolve(op, "cpu", DTYPES[dtype])
    benchmark.extra_info.update(
        op=op,
        contestant=name,
        backend=chosen if name == "m3bind" else name,
        dtype=dtype,
        device="cpu",
        threads=THREADS,
        torch=torch.__version__,
        flop=flop,
        min_ms=1e3 * best[name],
        median_ms=1e3 * statistics.median(turns[name]),
        times_m3bind=best[name] / best["m3bind"],
        **{f"times_{against.replace(' ', '_')}": best[name] / best[against]},
    )


def unit_rows(n: int, count: int, dtype: str = "fp32") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(n, FEATURES, generator=generator) for _ in range(count))
    return [F.normalize(x, dim=1).to(DTYPES[dtype]) for x in rows]


def step(loss: Callable[..., Tensor], leaves: Iterable[Tensor], *others: Tensor) -> Run:
    """Forward and backward by `leaves`, which need gradients."""
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run() -> None:
        torch.autograd.grad(loss(*leaves, *others), leaves)

    return run


def fastest(runs: Iterable[Run]) -> Run:
    def seconds(run: Run) -> float:
        run()
        return min(timed(run) for _ in range(2))

    return min(runs, key=seconds)


def gemm_floor(n: int, dtype: str, *, logits: int, teacher: int = 0) -> Run:
    """The bare GEMMs of an operator, outputs preallocated: `logits` products for the logits, as
    many of a teacher's, and the two of the gradient; the better of whole matrices and panels."""
    x, y = unit_rows(n, 2, dtype)
    grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)

    def with_panels(rows: int) -> Run:
        panel = torch.empty(rows, n, dtype=x.dtype)

        def gemms() -> None:
            for last in [False] * (logits - 1) + [True]:
                for i in range(0, n, rows):
                    part = x[i : i + rows]
                    for _ in range(1 + (teacher > 0)):
                        torch.mm(part, y.T, out=panel[: len(part)])
                    if last:
                        torch.mm(panel[: len(part)], y, out=grad_x[i : i + rows])
                        torch.addmm(grad_y, panel[: len(part)].T, part, out=grad_y)

        return gemms

    return fastest(with_panels(rows) for rows in sorted({n, min(n, 1024), min(n, 512)}))
