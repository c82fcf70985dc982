"""memory_budget of similarity_distill: both dot products stay, and change no result."""

from functools import partial

import pytest
import torch
from clip_oracle import needs_native
from distill_oracle import features
from test_memory_budget import FAST, N, kept_of, rows_of, rows_that_fit

from m3bind.losses import DistillClipLoss
from m3bind.ops import similarity_distill

D, E = 24, 40
IDS = torch.arange(N) // 3, torch.arange(N) // 4
CASES = {
    "kl": {},
    "ce, masked": {"kind": "ce", "mask_ids": IDS},
    "sums of rows": {"directions": "rows", "reduction": "sum"},
}


def mib(rows: int, columns: int = N, itemsize: int = 4) -> float:
    return 2 * rows * columns * itemsize / 2**20


def run(given, scale, teacher_scale=30.0, **options) -> dict[str, torch.Tensor]:
    x, y, *teacher = given
    x, y, scale = (t.detach().clone().requires_grad_() for t in (x, y, torch.tensor(scale)))
    loss = similarity_distill(x, y, scale, *teacher, teacher_scale, **options)
    loss.backward()
    return {"loss": loss.detach(), "x": x.grad, "y": y.grad, "scale": scale.grad}


@rows_that_fit
@pytest.mark.parametrize("scale", (20.0, -20.0))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", FAST)
def test_results_are_those_without(backend, case, scale, rows, kept):
    given, options = features(N, N, D, E, seed=0), {**CASES[case], "backend": backend}
    without = run(given, scale, **options, memory_budget=0)
    within = run(given, scale, **options, memory_budget=mib(rows))
    for name, value in without.items():
        if rows in (63, 1024, N):  # the same panels, so the same sums
            assert torch.equal(within[name], value), name
        atol = 1e-6 * float(value.abs().max())  # sums of other panels are rounded otherwise
        torch.testing.assert_close(within[name], value, rtol=1e-5, atol=atol)
    x, *others = given
    loss = similarity_distill(
        x.requires_grad_(), others[0], scale, *others[1:], 30.0, **options, memory_budget=mib(rows)
    )
    held = kept_of(loss)
    assert held.shape == (2, kept, N) and held.dtype == torch.float32
    # Unspoiled by masks: the plain dot products, but for the sign of the scale.
    for own, (a, b), sign in zip(held, (given[:2], given[2:]), (scale, 1), strict=True):
        dots = a[:kept].detach() @ b.T
        if backend == "cpp":
            own, dots = rows_of(own), dots if sign > 0 else -dots
        torch.testing.assert_close(own, dots, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("student", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("teacher", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_any_dtypes(backend, student, teacher):
    given = features(300, 200, 64, 40, seed=1)
    given = [*(t.to(student) for t in given[:2]), *(t.to(teacher) for t in given[2:])]
    without, within = (run(given, 50.0, backend=backend, memory_budget=budget) for budget in (0, 1))
    for name, value in without.items():
        assert torch.equal(within[name], value), name


def test_float64_keeps_float64():
    x, *others = features(150, 130, D, E, seed=0, dtype=torch.float64)
    loss = partial(similarity_distill, x.requires_grad_(), others[0], 20.0, *others[1:], 30.0)
    assert kept_of(loss(memory_budget=mib(70, 130, 8))).shape == (2, 64, 130)
    assert kept_of(loss(memory_budget=mib(70, 130, 8))).dtype == torch.float64
    half = partial(similarity_distill, x.detach().float().requires_grad_(), others[0].float())
    held = kept_of(half(20.0, *others[1:], 30.0))  # a teacher of float64 widens all
    assert held.shape == (2, 150, 130) and held.dtype == torch.float64


@pytest.mark.parametrize("backend", FAST)
def test_what_is_kept_is_used_and_not_spent(backend):
    x, y, *teacher = features(150, 140, D, E, seed=0)
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = similarity_distill(x, y, 20.0, *teacher, 30.0, backend=backend)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y), retain_graph=True)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for held in kept_of(loss).numpy():  # the student's, the teacher's
        before = held.copy()
        held[:] = float("nan")
        for spoiled in torch.autograd.grad(loss, (x, y), retain_graph=True):
            assert spoiled.isnan().all()
        held[:] = before


@needs_native
def test_rerun_with_own_shifts_keeps_too():
    # Rows so far apart that one shift loses the sums of some: the forward pass runs twice.
    given = features(150, 150, D, E, seed=0)
    given[0][:75] *= 30
    given[2][75:] *= 40
    masked = {"mask_ids": (IDS[0][:150], IDS[1][:150]), "backend": "cpp"}
    without, within = (run(given, 40.0, **masked, memory_budget=budget) for budget in (0, 1))
    for name, value in without.items():
        assert torch.equal(within[name], value), name


@pytest.mark.parametrize("budget", (0.0, 1.0))
@pytest.mark.parametrize("backend", FAST)
def test_saved_tensors_may_come_back_in_another_layout(backend, budget):
    given = features(20, 15, D, E, seed=0)

    def columns_first(t):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    want = run(given, 10.0, backend=backend, memory_budget=budget)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, columns_first):
        found = run(given, 10.0, backend=backend, memory_budget=budget)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", FAST)
def test_compiled(backend):
    torch._dynamo.reset()
    x, y, *teacher = features(150, 140, D, E, seed=0)

    def loss(x, y):
        budget = mib(70, 140)
        return similarity_distill(x, y, 20.0, *teacher, 30.0, memory_budget=budget, backend=backend)

    def gradients(function):
        leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for found, want in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(found, want)


def test_who_keeps_how_much():
    x, y, *teacher = features(150, 150, D, E, seed=0)
    loss = partial(similarity_distill, x.requires_grad_(), y, 20.0, *teacher, 30.0)
    assert kept_of(loss(memory_budget=float("inf"))).shape == (2, 150, 150)
    assert kept_of(loss(memory_budget=mib(100, 150))).shape == (2, 64, 150)
    assert kept_of(loss()).shape == (2, 150, 150)
    for budget, kept in ((0, 0), (None, 150)):
        module = DistillClipLoss(memory_budget=budget)
        _, distill = module(x, y, 20.0, *teacher, 30.0)
        assert kept_of(distill).shape == (2, kept, 150)
    long = features(5000, 5000, D, E, seed=0)
    long[0].requires_grad_()
    kept = kept_of(similarity_distill(*long[:2], 20.0, *long[2:], 30.0)).shape[1]
    assert kept == 64 * 2**20 // (2 * 5000 * 4) // 64 * 64  # 64 MiB, whole blocks
    with pytest.raises(ValueError, match="memory_budget=-1; pass a number of at least 0"):
        loss(memory_budget=-1)
