"""memory_budget: dot products kept from the forward to the backward pass change no result."""

from functools import partial

import pytest
import torch
from clip_oracle import errors, needs_native, run, truth, unit_pairs

from m3bind.losses import ClipLoss
from m3bind.ops import clip_loss, similarity_distill

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
N, D = 1100, 24  # panels of 1024 (chunked) or twice 512 rows (cpp), and of 76
LABELS = torch.arange(N).flip(0) // 2
IDS = torch.arange(N) // 3
# The plain case, and classes, masks, margins and totals, all of which change the kept panels.
CASES = {
    "plain": {},
    "margin": {"margin": 0.2},
    "everything": {
        "labels": LABELS, "mask_ids": (IDS, IDS), "margin": 0.2, "label_smoothing": 0.1,
    },
}  # fmt: skip


def mib(rows: int, columns: int = N) -> float:
    return rows * columns * 4 / 2**20


def kept_of(loss: torch.Tensor) -> torch.Tensor:
    """What the forward pass has kept: the last tensor that the operator saved."""
    nodes = [loss.grad_fn]
    while "m3bind" not in nodes[-1].name():
        node = nodes.pop()
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return nodes[-1].saved_tensors[-1]


@pytest.mark.parametrize("budget", (float("inf"), 1e308))
def test_any_budget_is_a_number(budget):
    x, y = (t.requires_grad_() for t in unit_pairs(20, 5, seed=0))
    assert kept_of(clip_loss(x, y, 10.0, memory_budget=budget)).shape == (20, 20)


@pytest.mark.parametrize("budget", (0.0, 1.0))
@pytest.mark.parametrize("backend", FAST)
def test_saved_tensors_may_come_back_in_another_layout(backend, budget):
    x, y = unit_pairs(20, 5, seed=0)

    def loss(*args):
        return clip_loss(*args, backend=backend, memory_budget=budget)

    def columns_first(t):
        return t.T.contiguous().T if t.dim() == 2 else t

    want = run(loss, x, y, 10.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, columns_first):
        found = run(loss, x, y, 10.0)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@needs_native
def test_statistics_of_another_batch_are_refused():
    x, y = unit_pairs(6, 8, seed=0)
    scale = torch.tensor(5.0)
    _, rows, cols, kept = torch.ops.m3bind.info_nce_fwd(x, y, scale, 0.0, True, 0, "cpp")
    for wrong in ((rows[:, :2], cols), (rows, cols[:, :2]), (rows[:2], cols)):
        with pytest.raises(RuntimeError, match="statistics are three for each row"):
            torch.ops.m3bind.info_nce_bwd(
                x, y, scale, 0.0, True, *wrong, kept, torch.ones(()), True, True, "cpp"
            )


TILE_ROWS = 512


def rows_of(held: torch.Tensor) -> torch.Tensor:
    """The matrix, of what backend cpp has kept tile after tile."""
    from m3bind import _C

    width = 128 if _C.cpu_capability.startswith("avx512") else 256
    panels = []
    for panel in filter(len, held.split(TILE_ROWS)):
        whole, rest = divmod(N, width)
        tiles = panel.flatten().split([len(panel) * width] * whole + [len(panel) * rest])
        panels.append(torch.cat([tile.view(len(panel), -1) for tile in tiles], dim=1))
    return torch.cat(panels) if panels else held


# Nothing, two blocks (part of a tile's rows), whole tiles, part of the last, all.
rows_that_fit = pytest.mark.parametrize(
    ("rows", "kept"), [(63, 0), (150, 128), (1024, 1024), (1099, 1088), (N, N)]
)


@rows_that_fit
@pytest.mark.parametrize("scale", (20.0, -20.0))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", FAST)
def test_results_are_those_without(backend, case, scale, rows, kept):
    x, y = unit_pairs(N, D, seed=0)

    def loss(*args, **kwargs):
        return clip_loss(*args, **CASES[case], backend=backend, **kwargs)

    without = run(loss, x, y, scale)
    within = run(lambda *args: loss(*args, memory_budget=mib(rows)), x, y, scale)
    for name, value in without.items():
        if rows in (1024, N):  # the same panels, so the same sums
            assert torch.equal(within[name], value), name
        torch.testing.assert_close(within[name], value, rtol=1e-5, atol=1e-8)
    held = kept_of(loss(x.requires_grad_(), y, scale, memory_budget=mib(rows)))
    assert held.shape == (kept, N)
    assert held.dtype == torch.float32
    # Unspoiled by the rules for pairs: the plain dot products, but for the sign of the scale.
    dots = x[:kept].detach() @ y.T
    if backend == "cpp":
        dots = dots if scale > 0 else -dots
        held = rows_of(held)
    torch.testing.assert_close(held, dots, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_error_against_float64(backend, dtype):
    x, y = unit_pairs(507, 123, seed=1, noise=2.0, dtype=dtype)
    want = truth(x, y, 100.0)
    plain, kept = (
        errors(run(partial(clip_loss, memory_budget=budget, backend=backend), x, y, 100.0), want)
        for budget in (0, 1)
    )
    for name, error in kept.items():
        assert error <= 1.01 * plain[name] + 1e-7, name


@pytest.mark.parametrize("backend", FAST)
def test_what_is_kept_is_used_and_not_spent(backend):
    x, y = (t.requires_grad_() for t in unit_pairs(150, D, seed=0))
    loss = clip_loss(x, y, 20.0, memory_budget=1, backend=backend)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y), retain_graph=True)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    kept_of(loss).numpy()[:] = float("nan")
    for spoiled in torch.autograd.grad(loss, (x, y)):
        assert spoiled.isnan().all()


@needs_native
def test_rerun_with_own_shifts_keeps_too():
    # Rows so far apart that one shift loses the sums of some: the forward pass runs twice.
    x, y = unit_pairs(150, D, seed=0)
    x[:75] *= 30
    y[75:] *= 0.01
    without, within = (
        run(partial(clip_loss, memory_budget=budget, backend="cpp"), x, y, 40.0)
        for budget in (0, 1)
    )
    for name, value in without.items():
        assert torch.equal(within[name], value), name


@pytest.mark.parametrize("backend", FAST)
def test_compiled(backend):
    torch._dynamo.reset()
    x, y = unit_pairs(150, D, seed=0)

    def loss(x, y, scale):
        return clip_loss(x, y, scale, memory_budget=mib(70, 150), backend=backend)

    eager = run(loss, x, y, 20.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for name, value in run(compiled, x, y, 20.0).items():
        torch.testing.assert_close(value, eager[name])


def test_module_and_messages():
    x, y = (t.requires_grad_() for t in unit_pairs(150, D, seed=0))
    assert kept_of(ClipLoss(memory_budget=1)(x, y, 20.0)).shape == (150, 150)
    assert kept_of(ClipLoss()(x, y, 20.0)).shape == (150, 150)
    assert kept_of(ClipLoss(memory_budget=0)(x, y, 20.0)).shape == (0, 150)
    long = unit_pairs(5000, D, seed=0)
    kept = kept_of(ClipLoss()(*(t.requires_grad_() for t in long), 20.0))
    assert kept.shape == (64 * 2**20 // (5000 * 4) // 64 * 64, 5000)  # 64 MiB, whole blocks
    with pytest.raises(ValueError, match="memory_budget=-1; pass a number of at least 0"):
        clip_loss(x, y, 1.0, memory_budget=-1)


@pytest.mark.parametrize("n", (300, 512))
@pytest.mark.parametrize("backend", FAST)
def test_few_rows_of_which_some_are_kept(backend, n):
    """All of them fit into one tile, and the kept ones, whole blocks of 64, cut it."""
    generator = torch.Generator().manual_seed(n)
    x, y, t = (torch.randn(n, 24, generator=generator) for _ in range(3))

    def gradients(loss, *leaves):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        return torch.autograd.grad(loss(*leaves), leaves)

    for rows in (64, 100, n - 1):
        budget = 1.001 * mib(rows, n)
        for loss in (
            lambda x, y, **how: clip_loss(x, y, 0.5, **how),
            lambda x, y, **how: clip_loss(x, y, 0.5, label_smoothing=0.1, **how),
            lambda x, y, **how: similarity_distill(
                x, y, 0.5, t.to(x.dtype), t.to(x.dtype), 0.3, **how
            ),
        ):
            got = gradients(partial(loss, backend=backend, memory_budget=budget), x, y)
            truth = gradients(partial(loss, backend="reference"), x.double(), y.double())
            for found, want in zip(got, truth, strict=True):
                assert (found - want).norm() <= 2e-6 * want.norm()
