"""siglip_loss, forward and backward, beside its peers and the floor of three bare GEMMs.

    pytest --benchmark-only         (M3BIND_BENCH_THREADS: 1, M3BIND_BENCH_SIZES: 1024,2048)

As in bench_clip.py, the numbers to compare are the minimum and median in `extra_info`, of rounds in
which all the contestants take turns in one process.
"""

import os
import statistics
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from bench_clip import timed

from m3bind import backends
from m3bind.ops import siglip_loss

SIZES = tuple(int(n) for n in os.environ.get("M3BIND_BENCH_SIZES", "1024,2048").split(","))
FEATURES = 512
SCALE, BIAS = 117.33, -12.93  # of the published SigLIP models
ROUNDS = 5
THREADS = int(os.environ.get("M3BIND_BENCH_THREADS", "1"))
CONTESTANTS = ("m3bind", "m3bind chunked", "open_clip", "torch.compile", "floor")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def one_matrix_loss(x, y, scale, bias):
    logits = scale * x @ y.T + bias
    z = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(z * logits).sum() / len(x)


def floor(n: int) -> Callable[[], None]:
    """Three GEMMs with preallocated outputs; the better of whole matrices and panels."""
    x, y = torch.randn(n, FEATURES), torch.randn(n, FEATURES)
    grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)

    def with_panels(rows: int) -> Callable[[], None]:
        panel = torch.empty(rows, n)

        def gemms():
            for i in range(0, n, rows):
                torch.mm(x[i : i + rows], y.T, out=panel)
                torch.mm(panel, y, out=grad_x[i : i + rows])
                torch.addmm(grad_y, panel.T, x[i : i + rows], out=grad_y)

        return gemms

    def seconds(run: Callable[[], None]) -> float:
        run()
        return min(timed(run) for _ in range(2))

    return min((with_panels(rows) for rows in {n, min(n, 1024), 512}), key=seconds)


def step(loss: Callable, n: int) -> Callable[[], None]:
    """Forward and backward on fixed features that need gradients, as do scale and bias."""
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, FEATURES, generator=generator), dim=1) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, y, torch.tensor(SCALE), torch.tensor(BIAS))]

    def run():
        torch.autograd.grad(loss(*leaves), leaves)

    return run


def contestant(name: str, n: int) -> Callable[[], None]:
    if name == "floor":
        return floor(n)
    if name == "open_clip":
        return step(pytest.importorskip("open_clip.loss").SigLipLoss(), n)
    if name == "torch.compile":
        return step(torch.compile(one_matrix_loss, fullgraph=True), n)
    if name == "m3bind chunked":
        return step(lambda *a: siglip_loss(*a, backend="chunked"), n)
    return step(siglip_loss, n)


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
def test_siglip_loss_forward_backward(benchmark, name, n):
    benchmark.group = f"siglip_loss fp32 forward+backward N={n} D={FEATURES}"
    turns = in_turns(n)
    best = {key: min(seconds) for key, seconds in turns.items()}
    benchmark.extra_info.update(
        device="cpu",
        backend=backends.resolve("siglip_loss", "cpu", torch.float32) if name == "m3bind" else name,
        threads=THREADS,
        torch=torch.__version__,
        flop=6 * n * n * FEATURES,
        in_turns_min_ms=1e3 * best[name],
        in_turns_median_ms=1e3 * statistics.median(turns[name]),
        times_floor=best[name] / best["floor"],
    )
    benchmark.pedantic(contestant(name, n), rounds=ROUNDS, warmup_rounds=2)
