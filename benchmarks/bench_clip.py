"""clip_loss, forward and backward, beside its peers and the floor of four bare GEMMs.

    pytest --benchmark-only                           (M3BIND_BENCH_THREADS, default 1)

Every row carries in `extra_info` the minimum and median of rounds in which all the contestants take
turns in one process: those are the numbers to compare. pytest-benchmark's own columns run one
contestant after the other, so a machine that changes its clock favours one of them.
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from m3bind import backends
from m3bind.ops import clip_loss

SIZES = (1024, 2048)
FEATURES = 512
SCALE = 100.0
ROUNDS = 5
THREADS = int(os.environ.get("M3BIND_BENCH_THREADS", "1"))
CONTESTANTS = ("m3bind", "m3bind chunked", "open_clip", "torch.compile", "floor")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def one_matrix_loss(x, y, scale):
    logits = scale * x @ y.T
    labels = torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def floor(n: int) -> Callable[[], None]:
    """Four GEMMs with preallocated outputs; the better of whole matrices and panels of 512 rows."""
    x, y = torch.randn(n, FEATURES), torch.randn(n, FEATURES)
    grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)

    def with_panels(rows: int) -> Callable[[], None]:
        panel = torch.empty(rows, n)

        def gemms():
            for i in range(0, n, rows):
                torch.mm(x[i : i + rows], y.T, out=panel)
            for i in range(0, n, rows):
                torch.mm(x[i : i + rows], y.T, out=panel)
                torch.mm(panel, y, out=grad_x[i : i + rows])
                torch.addmm(grad_y, panel.T, x[i : i + rows], out=grad_y)

        return gemms

    def seconds(run: Callable[[], None]) -> float:
        run()
        return min(timed(run) for _ in range(2))

    return min((with_panels(rows) for rows in (n, 512)), key=seconds)


def step(loss: Callable, n: int) -> Callable[[], None]:
    """Forward and backward on fixed features that need gradients, as does the scale."""
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, FEATURES, generator=generator), dim=1) for _ in range(2))
    scale = torch.tensor(SCALE)
    leaves = [t.requires_grad_() for t in (x, y, scale)]

    def run():
        torch.autograd.grad(loss(*leaves), leaves)

    return run


def contestant(name: str, n: int) -> Callable[[], None]:
    if name == "floor":
        return floor(n)
    if name == "open_clip":
        return step(pytest.importorskip("open_clip.loss").ClipLoss(), n)
    if name == "torch.compile":
        return step(torch.compile(one_matrix_loss, fullgraph=True), n)
    if name == "m3bind chunked":
        return step(lambda *a: clip_loss(*a, backend="chunked"), n)
    return step(clip_loss, n)


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@cache
def in_turns(n: int) -> dict[str, list[float]]:
    """Seconds of every contestant, taken in turns after two warm-up calls each."""
    runs = {name: contestant(name, n) for name in CONTESTANTS}
    for run in runs.values():
        run()
        run()
    rounds = [{name: timed(run) for name, run in runs.items()} for _ in range(ROUNDS)]
    return {name: [seconds[name] for seconds in rounds] for name in runs}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_clip_loss_forward_backward(benchmark, name, n):
    benchmark.group = f"clip_loss fp32 forward+backward N={n} D={FEATURES}"
    turns = in_turns(n)
    best = {key: min(seconds) for key, seconds in turns.items()}
    benchmark.extra_info.update(
        device="cpu",
        backend=backends.resolve("clip_loss", "cpu", torch.float32) if name == "m3bind" else name,
        threads=THREADS,
        torch=torch.__version__,
        flop=8 * n * n * FEATURES,
        in_turns_min_ms=1e3 * best[name],
        in_turns_median_ms=1e3 * statistics.median(turns[name]),
        times_floor=best[name] / best["floor"],
    )
    benchmark.pedantic(contestant(name, n), rounds=ROUNDS, warmup_rounds=2)
