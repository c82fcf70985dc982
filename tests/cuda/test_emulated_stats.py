"""similarity_stats of csrc/cuda, run by emulated blocks, against float64."""

import ctypes
import math

import pytest
import torch
from emulator import (
    TILE_COLS,
    TILE_ROWS,
    StatsBwd,
    flags,
    numbers,
    pointer,
    ranges,
    shape_of_tiles,
)
from stats_blocks import LN2, NONE, SHAPES, block, forward, inputs, kernels, named, order

__all__ = ["kernels"]  # a fixture


def check_forward(given, parts, axis, not_in) -> None:
    shift, total = parts[0].double(), parts[1].double()
    found = torch.logsumexp(total.log() + shift * LN2, 0)
    want = torch.logsumexp(given.logits.masked_fill(not_in, -math.inf), axis)
    torch.testing.assert_close(found, want, rtol=2e-6, atol=2e-6)
    plain = list(parts[2:].double().sum(1))
    if given.given[0]:
        want = (given.dots * given.positive).sum(axis)
        torch.testing.assert_close(plain.pop(0), want, rtol=1e-5, atol=1e-5)
    if given.given[2]:
        want = given.dots.masked_fill(given.out, 0).sum(axis)
        torch.testing.assert_close(plain.pop(0), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("given", [NONE, (True, False, False), (True, True, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(kernels, shape, given, dtype):
    found = inputs(shape, dtype, given, margin=0.25, seed=sum(shape))
    row_parts, col_parts, far, _ = forward(kernels, found, blocks=2, seed=shape[0])
    check_forward(found, row_parts, 1, found.not_in_row)
    check_forward(found, col_parts, 0, found.not_in_col)
    empty = [
        tile for tile in order(*found.shape)
        if block(found.not_in_row, tile).all(1).any() or block(found.not_in_col, tile).all(0).any()
    ]  # fmt: skip
    assert named(far, *found.shape) == set(empty)


@pytest.mark.parametrize("kept_rows", (0, 192))
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads_gives_the_same_bits(kernels, seed, kept_rows):
    given = (True, True, kept_rows == 0)  # where totals are wanted nothing is kept
    found = inputs((300, 700, 200), torch.bfloat16, given)
    first, again = (
        forward(kernels, found, blocks=blocks, seed=s, kept_rows=kept_rows)
        for blocks, s in ((1, 99), (3, seed))
    )
    pairs = [*zip(first[:3], again[:3], strict=True)]
    pairs += [(value, vars(again[3])[name]) for name, value in vars(first[3]).items()]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kept_rows", (128, 200))
def test_what_is_kept(kernels, kept_rows):
    """Powers, sums and shifts of whole tiles without a masked pair."""
    found = inputs((200, 1100, 136), torch.bfloat16, NONE, scale=30.0)
    row_mask, col_mask = (torch.full((n,), -1, dtype=torch.int32) for n in found.shape)
    row_mask[70] = col_mask[300] = 7  # a masked pair, in the second row and column of tiles
    found.numbers = numbers(None, None, row_mask, col_mask)
    found.given = (False, True, False)
    *_, far, kept = forward(kernels, found, kept_rows=kept_rows)
    assert not far.any()
    whole = torch.zeros(shape_of_tiles(kept_rows, 1100), dtype=torch.bool)
    whole[:3, :4] = True  # of rows 192 to 200 and columns 1024 to 1100 there is no whole tile
    whole[1, 1] = False
    if kept_rows == 128:
        whole = whole[:2]
    assert torch.equal(kept.shifts.isfinite(), whole)
    for row, col in whole.nonzero().tolist():
        want = torch.exp2(block(found.logits, (row, col)) / LN2 - kept.shifts[row, col].double())
        got = block(kept.powers, (row, col)).double()
        torch.testing.assert_close(got, want, rtol=2**-11 + 2e-5, atol=2**-24)
        at_rows = slice(row * TILE_ROWS, (row + 1) * TILE_ROWS)
        at_cols = slice(col * TILE_COLS, (col + 1) * TILE_COLS)
        for sums, axis in (
            (kept.row_sums[:, col, at_rows], 1),
            (kept.col_sums[:, row, at_cols], 0),
        ):
            weighted = want * block(found.dots, (row, col))
            torch.testing.assert_close(sums[0].double(), want.sum(axis), rtol=2e-5, atol=0)
            limit = 2e-5 * weighted.abs().sum(axis)
            assert ((sums[1].double() - weighted.sum(axis)).abs() <= limit).all()


def test_what_lies_far_apart_is_named(kernels):
    """A row far below the others of its tiles, a NaN, and many rows of tiles."""
    found = inputs((1200, 520, 64), torch.float16, NONE, scale=100)
    found.x[70] = (-40 * found.y[:256].float().mean(0)).half()
    found.y[300] = math.nan
    far = named(forward(kernels, found)[2], 1200, 520)
    dots = found.x.double() @ found.y.double().T * found.factor.double()
    for tile in order(1200, 520):
        logits = block(dots, tile)
        powers = torch.exp2(logits - logits.max().ceil())  # all NaN, where one is
        smallest = min(powers.sum(0).min(), powers.sum(1).min())
        assert (tile in far) == (not smallest >= 2**-64), tile
    assert 0 < len(far) < 19 * 3


def backward(kernels, given, *, apart=False, blocks=2, seed=0):
    """Derivatives by the dots, their sum with the dots, what rounding took of rows and columns; the
    derivatives in float64, and the sizes of what they are sums of."""
    rows, cols = given.shape
    tiles_n, tiles_m = shape_of_tiles(rows, cols)
    draw = torch.Generator().manual_seed(seed)
    vectors, weights = [], []
    for axis, not_in in ((1, given.not_in_row), (0, given.not_in_col)):
        lse = torch.logsumexp(given.logits.masked_fill(not_in, -math.inf), axis) / LN2
        nothing = lse == -math.inf
        shift = lse.masked_fill(nothing, 0).ceil()
        own = torch.randn(3, len(lse), generator=draw, dtype=torch.float64) * 100
        weight = (own[0] * torch.exp2(shift - lse)).masked_fill(nothing, 0)
        vectors.append(torch.stack([shift, weight, own[1], own[2]]).float())
        weights.append((own, lse))
    stride = -(-cols // 16) * 16
    out = torch.full((rows, stride), math.nan, dtype=torch.float16)
    scale_parts = torch.full((tiles_n * tiles_m,), math.nan)
    row_lost, col_lost = (
        torch.full((tiles_m, rows), math.nan),
        torch.full((tiles_n, cols), math.nan),
    )
    p = StatsBwd(
        sizes=given.sizes, numbers=given.numbers, factor=given.factor, margin=given.margin,
        row_shift_ranges=ranges(vectors[0][0], TILE_ROWS),
        col_shift_ranges=ranges(vectors[1][0], TILE_COLS),
        row_vectors=vectors[0], col_vectors=vectors[1], row_stride=vectors[0].stride(0),
        col_stride=vectors[1].stride(0), scale_parts=scale_parts, row_lost=row_lost,
        col_lost=col_lost,
    )  # fmt: skip
    kernels.emulate_stats_bwd(
        ctypes.c_bool(given.bf16), flags(*given.given, apart), pointer(given.x), pointer(given.y),
        pointer(out), stride, ctypes.byref(p), blocks, ctypes.c_uint64(seed),
    )  # fmt: skip
    (rows_own, row_lse), (cols_own, col_lse) = weights
    logits = given.logits / LN2
    terms = [
        (rows_own[0][:, None] * torch.exp2(logits - row_lse[:, None])).masked_fill(
            given.not_in_row, 0
        ),
        (cols_own[0] * torch.exp2(logits - col_lse)).masked_fill(given.not_in_col, 0),
        given.positive * rows_own[1][:, None],
        given.positive * cols_own[1],
    ]
    if given.given[2]:
        terms += [~given.out * rows_own[2][:, None], ~given.out * cols_own[2]]
    want, sizes = sum(terms), sum(term.abs() for term in terms)
    return out[:, :cols], scale_parts, row_lost, col_lost, want, sizes


def check_backward(given, found, apart=False) -> None:
    out, scale_parts, row_lost, col_lost, want, sizes = found
    # An exponential's relative error is its argument's absolute one, in float32.
    exact = 2**-23 * (8 + given.logits.abs().max() / LN2)
    scale = (given.dots.abs() * (want.abs() + sizes)).sum()
    assert abs(scale_parts.double().sum() - (want * given.dots).sum()) <= exact * scale
    if apart:
        both = given.positive & given.not_in_row & given.not_in_col
        want = want.masked_fill(both, 0)
        assert (out[both] == 0).all()
    error = (out.double() - want).abs()  # half a unit of float16, down to its smallest number
    assert (error <= want.abs() * 2**-11 + 2**-25 + exact * sizes).all()
    # What was lost is told: with it, sums are those of unrounded derivatives.
    for axis, lost in ((1, row_lost), (0, col_lost)):
        whole = out.double().sum(axis) + lost.double().sum(0)
        assert ((whole - want.sum(axis)).abs() <= exact * sizes.sum(axis)).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("given", [NONE, (True, False, False), (True, True, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(kernels, shape, given, dtype):
    found = inputs(shape, dtype, given, margin=0.25, seed=sum(shape) + 1)
    apart = dtype == torch.float16 and given[0]
    check_backward(found, backward(kernels, found, apart=apart, seed=shape[1]), apart)


def test_backward_of_rows_far_apart(kernels):
    """Where one exponential would be infinity times 0: some rows at 100, some at -100."""
    found = inputs((128, 512, 64), torch.float16, NONE)
    found.x[:32] *= 5
    found.x[32:40] *= 0.01
    found.logits[:] = found.x.double() @ found.y.double().T * found.factor.double() * LN2
    found.dots[:] = found.x.double() @ found.y.double().T
    check_backward(found, backward(kernels, found))


@pytest.mark.parametrize("seed", range(3))
def test_backward_in_any_order(kernels, seed):
    found = inputs((300, 700, 200), torch.float16, (True, True, False))
    first = backward(kernels, found, apart=True, blocks=1)
    again = backward(kernels, found, apart=True, blocks=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
