"""Derivatives of similarity_stats by the dot products of a tile."""

import triton
import triton.language as tl

from m3bind_kernels.tiles import pair_rules


@triton.jit
def one_exponential(low, high):
    """Whether 2^(logit - high) serves all rows and columns whose shifts lie between these.

    No logit is above `high`, and what underflows (at 2^-126) is then below 2^-62 of its row and
    column. Where they are further apart one exponential would make inf * 0.
    """
    return high - low <= 64.0


@triton.jit
def _softmax_terms(
    logits, not_in_row, not_in_col, row_shift, col_shift, row_weight, col_weight, high, one,
    SOME_OUT: tl.constexpr,
):  # fmt: skip
    """row_weight * 2^(logit - row_shift) + the same of the columns, where a pair is in them."""
    if one:
        power = tl.exp2(logits - high)
        by_row = (row_weight * tl.exp2(high - row_shift))[:, None]
        by_col = (col_weight * tl.exp2(high - col_shift))[None, :]
        if SOME_OUT:
            grad = tl.where(not_in_row, 0.0, power * by_row)
            grad += tl.where(not_in_col, 0.0, power * by_col)
        else:
            grad = power * (by_row + by_col)
    else:
        grad = tl.exp2(logits - row_shift[:, None]) * row_weight[:, None]
        other = tl.exp2(logits - col_shift[None, :]) * col_weight[None, :]
        if SOME_OUT:
            grad = tl.where(not_in_row, 0.0, grad)
            other = tl.where(not_in_col, 0.0, other)
        grad += other
    return grad


@triton.jit
def derivatives(
    dots,  # [rows, columns] float32
    row_class, col_class, row_mask, col_mask, rows, cols, num_rows, num_cols,
    row_at, col_at, row_stride, col_stride,  # pointers to their vectors, see `Upstream`
    row_shift, row_weight,  # the first two of the rows'
    base2, margin, high, one, special,
    HAS_CLASSES: tl.constexpr, HAS_MASKS: tl.constexpr, TOTALS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """The derivatives, 0 where `APART` leaves the pair to the caller, and for every row the sum of
    derivative * dot of all pairs."""
    col_shift = tl.load(col_at, mask=cols < num_cols, other=0.0)
    col_weight = tl.load(col_at + col_stride, mask=cols < num_cols, other=0.0)
    if special:
        left_out, positive, not_in_row, not_in_col = pair_rules(
            row_class, col_class, row_mask, col_mask, rows, cols, num_rows, num_cols,
            HAS_CLASSES, HAS_MASKS,
        )  # fmt: skip
        if HAS_CLASSES:
            dots = tl.where(positive, dots - margin, dots)
        grad = _softmax_terms(
            dots * base2, left_out | not_in_row, left_out | not_in_col,
            row_shift, col_shift, row_weight, col_weight, high, one, True,
        )  # fmt: skip
        if HAS_CLASSES:
            row_grad = tl.load(row_at + 2 * row_stride, mask=rows < num_rows, other=0.0)
            col_grad = tl.load(col_at + 2 * col_stride, mask=cols < num_cols, other=0.0)
            grad += tl.where(positive, row_grad[:, None] + col_grad[None, :], 0.0)
        if TOTALS:
            row_grad = tl.load(row_at + 3 * row_stride, mask=rows < num_rows, other=0.0)
            col_grad = tl.load(col_at + 3 * col_stride, mask=cols < num_cols, other=0.0)
            grad += tl.where(left_out, 0.0, row_grad[:, None] + col_grad[None, :])
        by_dot = tl.sum(grad * dots, 1)
        if APART:
            grad = tl.where(not_in_row & not_in_col, 0.0, grad)
    else:
        grad = _softmax_terms(
            dots * base2, 0, 0, row_shift, col_shift, row_weight, col_weight, high, one, False,
        )  # fmt: skip
        if TOTALS:
            row_grad = tl.load(row_at + 3 * row_stride)
            col_grad = tl.load(col_at + 3 * col_stride)
            grad += row_grad[:, None] + col_grad[None, :]
        by_dot = tl.sum(grad * dots, 1)
    return grad, by_dot
