"""similarity_distill, forward and backward, beside its peers and the floor of six bare GEMMs.

    pytest --benchmark-only                           (M3BIND_BENCH_THREADS, default 1)

As in bench_clip.py, the minimum and median in `extra_info` come from rounds in which all the
contestants take turns in one process: those are the numbers to compare. open_clip's row is its
DistillClipLoss' distillation term; its contrastive term would be the same work for everybody. The
floor is that of O(N + M) memory: torch.compile keeps both N x N matrices and needs four GEMMs.
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
from m3bind.ops import similarity_distill

SIZES = (1024, 2048)
FEATURES = 512
SCALE, TEACHER_SCALE = 50.0, 100.0
ROUNDS = 5
THREADS = int(os.environ.get("M3BIND_BENCH_THREADS", "1"))
CONTESTANTS = ("m3bind", "m3bind chunked", "open_clip", "torch.compile", "floor")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def dense_loss(x, y, scale, teacher_x, teacher_y, teacher_scale):
    """One matrix of the student and one of the teacher: both directions share them."""
    student, teacher = scale * x @ y.T, teacher_scale * teacher_x @ teacher_y.T
    rows = F.cross_entropy(student, teacher.softmax(1))
    columns = F.cross_entropy(student.T, teacher.T.softmax(1))
    return (rows + columns) / 2


def open_clip_loss(x, y, scale, teacher_x, teacher_y, teacher_scale):
    loss = pytest.importorskip("open_clip.loss").DistillClipLoss()
    student, student_text = loss.get_logits(x, y, scale)
    teacher, teacher_text = loss.get_logits(teacher_x, teacher_y, teacher_scale)
    return (loss.dist_loss(teacher, student) + loss.dist_loss(teacher_text, student_text)) / 2


def ours(backend: str | None) -> Callable:
    return lambda *args: similarity_distill(*args, kind="ce", backend=backend)


def floor(n: int) -> Callable[[], None]:
    """Six GEMMs with preallocated outputs; the better of whole matrices and panels of 512 rows."""
    x, y, teacher_x, teacher_y = (torch.randn(n, FEATURES) for _ in range(4))
    grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)

    def with_panels(rows: int) -> Callable[[], None]:
        panel, teachers = torch.empty(2, rows, n)

        def gemms():
            for backward in (False, True):
                for i in range(0, n, rows):
                    torch.mm(x[i : i + rows], y.T, out=panel)
                    torch.mm(teacher_x[i : i + rows], teacher_y.T, out=teachers)
                    if backward:
                        torch.mm(panel, y, out=grad_x[i : i + rows])
                        torch.addmm(grad_y, panel.T, x[i : i + rows], out=grad_y)

        return gemms

    def seconds(run: Callable[[], None]) -> float:
        run()
        return min(timed(run) for _ in range(2))

    return min((with_panels(rows) for rows in (n, 512)), key=seconds)


def step(loss: Callable, n: int) -> Callable[[], None]:
    """Forward and backward on fixed features that need gradients, as does the student's scale."""
    generator = torch.Generator().manual_seed(0)
    x, y, *teacher = (
        F.normalize(torch.randn(n, FEATURES, generator=generator), dim=1) for _ in range(4)
    )
    scale = torch.tensor(SCALE)
    leaves = [t.requires_grad_() for t in (x, y, scale)]
    teacher_scale = torch.tensor(TEACHER_SCALE)

    def run():
        torch.autograd.grad(loss(*leaves, *teacher, teacher_scale), leaves)

    return run


def contestant(name: str, n: int) -> Callable[[], None]:
    if name == "floor":
        return floor(n)
    losses = {
        "m3bind": ours(None),
        "m3bind chunked": ours("chunked"),
        "open_clip": open_clip_loss,
        "torch.compile": torch.compile(dense_loss, fullgraph=True),
    }
    return step(losses[name], n)


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
def test_similarity_distill_forward_backward(benchmark, name, n):
    benchmark.group = f"similarity_distill fp32 forward+backward N={n} D={FEATURES}"
    turns = in_turns(n)
    best = {key: min(seconds) for key, seconds in turns.items()}
    chosen = backends.resolve("similarity_distill", "cpu", torch.float32)
    benchmark.extra_info.update(
        device="cpu",
        backend=chosen if name == "m3bind" else name,
        threads=THREADS,
        torch=torch.__version__,
        flop=12 * n * n * FEATURES,
        in_turns_min_ms=1e3 * best[name],
        in_turns_median_ms=1e3 * statistics.median(turns[name]),
        times_floor=best[name] / best["floor"],
    )
    benchmark.pedantic(contestant(name, n), rounds=ROUNDS, warmup_rounds=2)


def test_contestants_compute_the_same():
    generator = torch.Generator().manual_seed(1)
    given = [F.normalize(torch.randn(40, 16, generator=generator), dim=1) for _ in range(4)]
    args = (*given[:2], SCALE, *given[2:], TEACHER_SCALE)
    want = similarity_distill(*args, kind="ce", backend="reference")
    for loss in (ours(None), ours("chunked"), open_clip_loss, dense_loss):
        torch.testing.assert_close(loss(*args), want, rtol=1e-5, atol=1e-5)
