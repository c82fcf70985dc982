"""What the forward pass of similarity_stats in Triton keeps, when it does, and that it is used."""

import math
from functools import partial

import pytest
import torch
from clip_oracle import float32_logits_loss, run, truth, unit_pairs
from kept_cases import (
    ALL,
    FEATURES,
    LARGER,
    N,
    inputs_of,
    of_loss,
    tiles_kept,
    tiles_to_keep,
    worth_it,
)
from test_memory_budget import kept_of
from test_triton_stats import DEVICE, DTYPES, check_rule, many_waves, poisoned_memory, run_triton

from m3bind import backends
from m3bind.ops import clip_loss, stats
from m3bind_kernels import kept, stats_bwd, stats_fwd, waves

__all__ = ["many_waves", "poisoned_memory", "worth_it"]  # fixtures


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers_and_shifts(dtype):
    x, y = unit_pairs(N, FEATURES, seed=0, noise=2.0, dtype=dtype)
    found = of_loss(x, y, 30.0)
    assert tiles_kept(found).any()
    assert torch.equal(tiles_kept(found), tiles_to_keep(N, dtype))
    half = dtype != torch.float32
    assert found.powers.dtype == (torch.float16 if half else torch.float32)
    logits = 30.0 / math.log(2) * x.double() @ y.double().T
    for row, col in tiles_kept(found).nonzero().tolist():
        first = row * found.config.block_m, col * found.config.block_n
        at = (
            slice(first[0], first[0] + found.config.block_m),
            slice(first[1], first[1] + found.config.block_n),
        )
        shift = found.shifts[row, col].double().cpu()
        want = torch.exp2(logits[at] - shift)
        assert want.max() < (2**15 if half else 1)
        got = found.powers[at].double().cpu()
        torch.testing.assert_close(got, want, rtol=2**-11 + 2e-5 if half else 2e-5, atol=2**-24)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_is_kept_is_used(dtype):
    x, y = (t.to(DEVICE).requires_grad_() for t in unit_pairs(N, FEATURES, seed=0, dtype=dtype))
    loss = clip_loss(x, y, 20.0, backend="triton", memory_budget=ALL)
    first, second = (torch.autograd.grad(loss, (x, y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    found = kept.Kept.of(inputs_of(x, y), kept_of(loss).data)
    found.powers.fill_(torch.nan)
    for spoiled in torch.autograd.grad(loss, (x, y)):
        # Only the last tiles are without anything that was kept.
        first = 128 * LARGER  # in whole tiles, of which some are beside the diagonal
        assert spoiled[:first].isnan().any(1).all()
        assert not spoiled[-8:].isnan().any()


@pytest.mark.parametrize("rows", (0, 64, 128))
def test_budget(rows):
    """Whole blocks of rows, powers and shifts within the budget; the others are formed again."""
    x, y = unit_pairs(N, FEATURES, seed=0, noise=2.0, dtype=torch.bfloat16)
    blocks = -(-N // 64)  # of columns; powers of 2 bytes, and sums of 64 rows or columns
    mib = 4 * blocks * (rows * (32 + 2) + rows // 64 * (2 * 64 + 1)) / 2**20 + 1e-6
    leaf = x.to(DEVICE).requires_grad_()
    memory = kept_of(clip_loss(leaf, y.to(DEVICE), 30.0, backend="triton", memory_budget=mib))
    assert memory.nbytes <= mib * 2**20
    found = kept.Kept.of(inputs_of(leaf, y.to(DEVICE)), memory)
    assert (0 if found is None else found.powers.shape[0]) == rows
    plain, want = run(float32_logits_loss, x, y, 30.0), truth(x, y, 30.0)
    check_rule([(run_triton(x, y, 30.0, memory_budget=mib), plain, want)])


def test_the_default_keeps_nothing():
    x, y = (t.to(DEVICE).requires_grad_() for t in unit_pairs(N, FEATURES, seed=0))
    assert kept_of(clip_loss(x, y, 30.0, backend="triton")).numel() == 0


def test_a_negative_margin_raises_positives_alone(monkeypatch):
    """Tiles without any are not formed again for it."""
    formed_again, kernel = [], stats_bwd.kept_bwd_kernel

    def spied(*given):
        left, count = kernel(*given)
        formed_again[-1].append((int(count), len(left)))
        return left, count

    monkeypatch.setattr(stats_bwd, "kept_bwd_kernel", spied)
    x, y = unit_pairs(N, FEATURES, seed=0, noise=2.0, dtype=torch.bfloat16)
    for margin in (0.0, -0.5):
        formed_again.append([])
        run_triton(x, y, 30.0, memory_budget=ALL, margin=margin)
    assert formed_again[0] == formed_again[1]
    assert any(count < tiles for count, tiles in formed_again[0])


def test_the_tile_is_not_the_tuner_s(monkeypatch):
    """Both passes have to know it, whatever was measured between them."""
    for module in (stats_fwd, stats_bwd):
        monkeypatch.setattr(module, "choose", None)
    x, y = unit_pairs(150, FEATURES, seed=0, dtype=torch.bfloat16)
    run_triton(x, y, 30.0, memory_budget=ALL)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_saved_tensors_may_come_back_in_another_layout(dtype):
    x, y = unit_pairs(150, FEATURES, seed=0, noise=2.0, dtype=dtype)
    want = run_triton(x, y, 20.0, memory_budget=ALL)

    def spread(t):
        if t.dim() != 1:
            return t
        wider = t.new_empty(len(t), 2)
        wider[:, 0] = t
        return wider[:, 0]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, spread):
        got = run_triton(x, y, 20.0, memory_budget=ALL)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_where_nothing_is_saved_nothing_is_used(monkeypatch):
    """Few features, few pairs, or sums of all logits."""
    x, y = unit_pairs(150, FEATURES, seed=0, noise=2.0, dtype=torch.bfloat16)
    smoothed = {"label_smoothing": 0.1}
    sides, pairs = kept.by_sides.__globals__, waves.__dict__
    assert (stats.FEW_FEATURES, stats.FEW_PAIRS) == (0, 0)
    for patch, options in (
        ((sides, "MOST_FEATURES", FEATURES), {}),
        ((pairs, "PRECISE_PAIRS", 150 * 150), {}),
        (None, smoothed),
    ):
        with monkeypatch.context() as patched:
            if patch is not None:
                patched.setitem(*patch)
            without, within = (
                run_triton(x, y, 20.0, memory_budget=mib, **options) for mib in (0, ALL)
            )
        assert all(torch.equal(within[name], value) for name, value in without.items())


def test_no_memory_is_taken_where_nothing_is_saved(monkeypatch):
    """What the operator knows of the kernels' rules is true."""
    monkeypatch.undo()
    from m3bind_kernels import stats_side

    assert stats.FEW_FEATURES == stats_side.MOST_FEATURES and stats.BLOCK == kept.BLOCK
    assert stats.FEW_PAIRS == waves.PRECISE_PAIRS

    def rows(n, d, dtype=torch.bfloat16, totals=False):
        return stats.rows_to_keep(torch.empty(n, d, dtype=dtype), n, math.inf, totals, "triton")

    assert rows(1024, 257) == rows(2048, 256) == rows(2048, 512, totals=True) == 0
    assert rows(2048, 257) == 2048 and rows(1000, 257, torch.float32) == 1000


def test_opcheck_and_shape():
    x, y = (t.to(DEVICE).requires_grad_() for t in unit_pairs(150, FEATURES, seed=0))
    ids = torch.arange(150, dtype=torch.int32, device=DEVICE) * 4 + 3
    scale = torch.tensor(9.0, device=DEVICE, requires_grad=True)
    forward = torch.ops.m3bind.similarity_stats_fwd.default
    for rows in (64, 150):
        arguments = (x, y, scale, ids, ids, None, None, 0.0, False, rows, "triton")
        # Of what is not kept the memory is as it was, and equals nothing.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(forward, arguments, test_utils=checks)
        memory = forward(*arguments)[2]
        assert memory.shape == stats.kept_shape(x, rows, 150, "triton")
    assert backends.keeps("similarity_stats", "cuda") == "powers"


def test_compiled():
    torch._dynamo.reset()
    x, y = (t.to(DEVICE) for t in unit_pairs(150, FEATURES, seed=0))
    loss = partial(clip_loss, memory_budget=0.06, backend="triton")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    eager, found = (run(call, x, y, 20.0) for call in (loss, compiled))
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value)
