"""The operators of backend cuda as a whole: tiles by emulated blocks, the rest by Triton's
interpreter; the truth is that of chunked panels in float64. Run by test_emulated_operator.py.
"""

import pytest
import quick_interpreter  # noqa: F401
import torch
from crossed import crossed
from stand_ins import calls

from m3bind import chunked, reference
from m3bind_kernels import hopper, native, stats_side, waves

__all__ = ["calls"]  # a fixture
HALVES = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(rows: int, cols: int, features: int, dtype, *, classes: bool, masks: bool, seed: int):
    draw = torch.Generator().manual_seed(seed)
    x, y = (
        torch.nn.functional.normalize(torch.randn(n, features, generator=draw), dim=1).to(dtype)
        for n in (rows, cols)
    )
    row_class = col_class = row_mask = col_mask = None
    if classes:  # as of the diagonal: each class once, with both bits
        row_class = torch.randperm(rows, generator=draw).int() * 4 + 3
        col_class = torch.randperm(cols, generator=draw).int() * 4 + 3
    if masks:
        row_mask = torch.randint(0, 20, (rows,), generator=draw).int()
        col_mask = torch.randint(0, 20, (cols,), generator=draw).int()
    return x, y, torch.tensor(20.0), row_class, col_class, row_mask, col_mask


def error(got, want) -> float:
    return float((got.double() - want).norm() / want.norm())


GIVEN = (True, False, False), (True, True, True), (False, False, True)


@pytest.mark.parametrize(("given", "dtype"), crossed(GIVEN, HALVES), ids=str)
def test_statistics_and_gradients(calls, monkeypatch, given, dtype):
    classes, masks, totals = given
    monkeypatch.setattr(waves, "PRECISE_PAIRS", 0)
    monkeypatch.setattr(waves, "WAVE_BYTES", 1 << 18)
    monkeypatch.setattr(waves, "WAVE_ROWS", 128)  # several waves
    monkeypatch.setattr(stats_side, "MOST_FEATURES", 0)
    rows, cols = 300, 520
    inputs = drawn(rows, cols, 72, dtype, classes=classes, masks=masks, seed=7)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    before = dict(calls)
    found = native.similarity_stats_fwd(*inputs, 0.1, totals, 0)
    want = chunked.similarity_stats_fwd(*wide, 0.1, totals, 0)
    assert calls["stats_fwd"] > before["stats_fwd"]
    for got, ours in zip(found[:2], want[:2], strict=True):
        torch.testing.assert_close(got[:2], ours[:2], rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(got[2], ours[2], rtol=2e-6, atol=2e-4)  # sums that cancel
    draw = torch.Generator().manual_seed(3)
    upstream = [torch.randn(3, n, generator=draw, dtype=torch.float64) / n for n in (rows, cols)]
    for one in upstream:  # nothing comes from what was not asked for
        one[1] *= classes
        one[2] *= totals
    lse = want[0][0], want[1][0]
    grads = native.similarity_stats_bwd(
        *inputs, 0.1, totals, *lse, found[2], *(u.float() for u in upstream), True, True
    )
    exact = chunked.similarity_stats_bwd(
        *wide, 0.1, totals, *lse, want[2], *upstream, True, True
    )  # fmt: skip
    assert calls["stats_bwd"] >= before["stats_bwd"] + 2
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11  # of the gradient itself
    for got, ours in zip(grads[:2], exact[:2], strict=True):
        assert error(got, ours) < rounding
    assert error(grads[2], exact[2]) < 3e-4


@pytest.mark.parametrize("kept_rows", (128, 300))
def test_powers_are_kept(calls, monkeypatch, kept_rows):
    """Part of a wave, and all rows; the last tiles of rows and columns are not whole."""
    monkeypatch.setattr(waves, "PRECISE_PAIRS", 0)
    monkeypatch.setattr(waves, "WAVE_BYTES", 1 << 18)
    monkeypatch.setattr(waves, "WAVE_ROWS", 256)
    monkeypatch.setattr(stats_side, "MOST_FEATURES", 0)
    x, y, scale, *_ = drawn(300, 800, 72, torch.bfloat16, classes=False, masks=False, seed=8)
    diagonal = [torch.arange(n, dtype=torch.int32) * 4 + 3 for n in (300, 800)]
    inputs = (x, y, scale, *diagonal, None, None)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    draw = torch.Generator().manual_seed(3)
    upstream = [torch.randn(3, n, generator=draw, dtype=torch.float64) / n for n in (300, 800)]
    rows, cols, memory = native.similarity_stats_fwd(*inputs, 0.0, False, kept_rows)
    exact = chunked.similarity_stats_fwd(*wide, 0.0, False, 0)
    torch.testing.assert_close(rows[:2], exact[0][:2], rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(cols[:2], exact[1][:2], rtol=2e-6, atol=2e-5)

    def gradients(kept):
        return native.similarity_stats_bwd(
            *inputs, 0.0, False, exact[0][0], exact[1][0], kept, *(u.float() for u in upstream),
            True, True,
        )  # fmt: skip

    want = chunked.similarity_stats_bwd(
        *wide, 0.0, False, exact[0][0], exact[1][0], exact[2], *upstream, True, True
    )
    found = gradients(memory)
    for got, ours, limit in zip(found, want, (2**-8, 2**-8, 4e-6), strict=True):
        assert error(got, ours) < limit
    memory[: kept_rows * 416] = torch.nan  # the powers, 832 to a row, are what is used
    *spoiled, of_scale = gradients(memory)
    assert all(t.isnan().any() for t in spoiled) and torch.equal(of_scale, found[2])


def test_what_does_not_fit_is_triton_s(calls):
    before = dict(calls)
    for features, dtype in ((33, torch.bfloat16), (64, torch.float32)):
        inputs = drawn(70, 80, features, dtype, classes=True, masks=False, seed=1)
        wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
        found = native.similarity_stats_fwd(*inputs, 0.0, False, 0)
        want = chunked.similarity_stats_fwd(*wide, 0.0, False, 0)
        torch.testing.assert_close(found[0], want[0], rtol=2e-6, atol=2e-5)
    assert calls == before


def test_rows_that_are_far_apart(calls):
    """Tiles that the emulated kernel names are corrected by Triton's."""
    before = calls["stats_fwd"]
    inputs = drawn(130, 300, 64, torch.float16, classes=False, masks=False, seed=2)
    inputs[0][:5] *= 60
    inputs[0][64:70] *= -60
    wide = [t.double() if t is not None else t for t in inputs]
    found = native.similarity_stats_fwd(*inputs, 0.0, False, 0)
    want = chunked.similarity_stats_fwd(*wide, 0.0, False, 0)
    assert calls["stats_fwd"] == before + 1
    for got, ours in zip(found[:2], want[:2], strict=True):
        torch.testing.assert_close(got[0], ours[0], rtol=2e-6, atol=2e-5)


def test_the_tiles_are_those_of_the_kernels():
    from emulator import TILE_COLS, TILE_ROWS

    assert (hopper.TILE.block_m, hopper.TILE.block_n) == (TILE_ROWS, TILE_COLS)


KINDS = (False, False), (True, True), (False, True), (True, False)


@pytest.mark.parametrize(("kind", "dtype"), crossed(KINDS, HALVES), ids=str)
def test_siglip(calls, monkeypatch, kind, dtype):
    """``separated``: all derivatives but few are so small that a wave is formed again."""
    masks, separated = kind
    monkeypatch.setattr(waves, "PRECISE_PAIRS", 0)
    monkeypatch.setattr(waves, "WAVE_BYTES", 1 << 18)
    monkeypatch.setattr(waves, "WAVE_ROWS", 128)
    rows, cols = 300, 520
    x, y, scale, *numbers = drawn(rows, cols, 72, dtype, classes=True, masks=masks, seed=5)
    bias = torch.tensor(-30.0 if separated else -8.0)
    if separated:  # positives alike, so that their losses are small, too
        x = y[numbers[1].argsort()[numbers[0].long() // 4]]
        scale = scale * 3
    inputs = (x, y, scale, bias, *numbers)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    # A small loss has the absolute error of its logit, in float32, as its relative one.
    exact = 2**-23 * (8 + float((wide[2] * wide[0] @ wide[1].T).abs().max() + bias.abs()))
    before = calls["siglip"]
    torch.testing.assert_close(
        native.siglip_fwd(*inputs), chunked.siglip_fwd(*wide), rtol=exact, atol=0
    )
    assert calls["siglip"] == before + 1
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)).double()
    got = native.siglip_bwd(*inputs, weights.float(), True, True)
    want = chunked.siglip_bwd(*wide, weights, True, True)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert all(error(g, w) < rounding for g, w in zip(got[:2], want[:2], strict=True))
    assert all(error(g, w) < 1e-4 for g, w in zip(got[2:], want[2:], strict=True))
    got = native.siglip_total_fwd(*inputs, True, True, True)
    want = chunked.siglip_total_fwd(*wide, True, True, True)
    limits = (exact, rounding, rounding, 1e-4, 1e-4)
    assert all(error(g, w) < limit for g, w, limit in zip(got, want, limits, strict=True))
    assert calls["siglip"] >= before + 9


@pytest.mark.parametrize(("k", "masks"), crossed((1, 10, 300), (False, True)))
def test_topk(calls, k, masks):
    """Whole numbers, so that scores are exact and many are equal; rising and falling ones; NaN."""
    dtype = HALVES[masks]
    draw = torch.Generator().manual_seed(k)
    queries, gallery = (
        torch.randint(-3, 4, (n, 40), generator=draw).to(dtype) for n in (150, 1400)
    )
    gallery[600:1000, 7] = torch.arange(400).to(dtype)
    gallery[1000:1400, 7] = torch.arange(400, 0, -1).to(dtype)
    queries[3] = 0  # all scores are equal
    queries[5, 0] = torch.nan
    gallery[700, 3] = torch.nan
    ids: list = [None, None]
    if masks:
        ids = [torch.randint(0, 9, (n,), generator=draw) for n in (150, 1400)]
        ids[0][8] = ids[1][:] = 4  # nothing is left for query 8
        ids[1][1::2] = 5
        ids[0][9] = 5
    before = calls["topk"]
    found = native.similarity_topk_fwd(queries, gallery, k, *ids)
    assert calls["topk"] == before + 1
    want = reference.similarity_topk(queries, gallery, k, *ids)
    assert torch.equal(found[1], want[1])
    torch.testing.assert_close(found[0], want[0], rtol=0, atol=0, equal_nan=True)


def test_more_neighbours_than_there_is_space_for_are_triton_s(calls):
    draw = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randint(-3, 4, (n, 64), generator=draw).half() for n in (5, 900))
    before = calls["topk"]
    found = native.similarity_topk_fwd(queries, gallery, 700, None, None)
    assert calls["topk"] == before
    assert torch.equal(found[1], reference.similarity_topk(queries, gallery, 700)[1])
