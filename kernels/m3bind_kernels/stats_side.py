"""similarity_stats, backward, where all features of a row fit the registers: gradients of one side.

A program keeps the gradients of a block of rows, and goes over all columns: nothing of N x M is
stored, and sums have one order. The gradient of y is that of x with the sides exchanged, so that
both cost 5 products instead of 4; for few features that is less than the way of derivatives to the
memory and back.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import side_config
from m3bind_kernels.derivatives import derivatives, one_exponential
from m3bind_kernels.launch import INTERPRETED, Inputs, block_ranges
from m3bind_kernels.tiles import dot_products, is_special, row_features, times
from m3bind_kernels.upstream import Upstream

MOST_FEATURES = 256


@triton.jit
def _stats_side_kernel(
    x, y,  # pointers [N, D], [M, D]
    other,  # [M, D]: y as the derivatives are multiplied by it
    factor,  # [1] float32: logits in base 2 are factor * (dot - margin * positive)
    row_class, col_class, row_mask, col_mask,  # [N] or [M] int32
    row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,  # [tiles, 2]
    row_shift_ranges, col_shift_ranges,  # [tiles, 2] float32
    row_vectors, col_vectors,  # [4, N], [4, M] float32: see `Upstream`
    gradient,  # [N, D] float32: sums of derivative * other
    scale_parts,  # [tiles of rows] float32: sums of derivative * dot
    lost,  # [N] float32: what rounding takes from the sums of rows, or None
    num_rows, num_cols, num_features, row_stride, col_stride, margin,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,  # all features, padded to a power of two
    HAS_CLASSES: tl.constexpr, HAS_MASKS: tl.constexpr, TOTALS: tl.constexpr,
    GRADIENT: tl.constexpr,  # whether `gradient` is wanted, not the scale's gradient alone
    APART: tl.constexpr,  # whether pairs with both bits are left to the caller
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_at = row_vectors + rows
    row_shift = tl.load(row_at, mask=rows < num_rows, other=0.0)
    row_weight = tl.load(row_at + row_stride, mask=rows < num_rows, other=0.0)
    row_low = tl.load(row_shift_ranges + 2 * row_tile)
    row_high = tl.load(row_shift_ranges + 2 * row_tile + 1)
    base2 = tl.load(factor)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    by_scale = tl.zeros([BLOCK_M], tl.float32)
    row_lost = tl.zeros([BLOCK_M], tl.float32)
    for col_tile in range(0, tl.cdiv(num_cols, BLOCK_N)):
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # The forward pass's bits: the rounding of its log-sum-exps cancels theirs.
        dots = dot_products(
            x, y, row_tile * BLOCK_M, col_tile * BLOCK_N, num_rows, num_cols, num_features,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, False, INTERPRETED,
        )  # fmt: skip
        low = tl.minimum(row_low, tl.load(col_shift_ranges + 2 * col_tile))
        high = tl.maximum(row_high, tl.load(col_shift_ranges + 2 * col_tile + 1))
        special = is_special(
            row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,
            row_tile, col_tile, num_rows, num_cols, BLOCK_M, BLOCK_N, HAS_CLASSES, HAS_MASKS,
        )  # fmt: skip
        grad, by_dot = derivatives(
            dots, row_class, col_class, row_mask, col_mask, rows, cols, num_rows, num_cols,
            row_at, col_vectors + cols, row_stride, col_stride, row_shift, row_weight, base2,
            margin, high, one_exponential(low, high), special,
            HAS_CLASSES, HAS_MASKS, TOTALS, APART,
        )  # fmt: skip
        by_scale += by_dot
        if GRADIENT:
            factors = row_features(other, cols, num_cols, num_features, BLOCK_D, EVEN_D)
            rounded = grad.to(factors.dtype)
            if lost is not None:
                row_lost += tl.sum(grad - rounded.to(tl.float32), 1)
            sums += times(rounded, factors, INTERPRETED)
    tl.store(scale_parts + row_tile, tl.sum(by_scale, 0))
    if lost is not None:
        tl.store(lost + rows, row_lost, mask=rows < num_rows)
    if GRADIENT:
        at = tl.arange(0, BLOCK_D)
        inside = (rows < num_rows)[:, None] & (at < num_features)[None, :]
        tl.store(
            gradient + rows.to(tl.int64)[:, None] * num_features + at[None, :], sums, mask=inside
        )


def by_sides(inputs: Inputs) -> bool:
    """Whether gradients are formed here."""
    return inputs.x.shape[1] <= MOST_FEATURES


def exchanged(inputs: Inputs) -> Inputs:
    """The same with y as rows and x as columns."""
    return replace(
        inputs, x=inputs.y, y=inputs.x, row_mask=inputs.col_mask, col_mask=inputs.row_mask,
        row_class=_with_other_bits(inputs.col_class), col_class=_with_other_bits(inputs.row_class),
    )  # fmt: skip


def _with_other_bits(classes: Tensor | None) -> Tensor | None:
    """Which side is the only one of its class is said by two bits, one for each."""
    if classes is None:
        return None
    bits = (classes & 1) << 1 | (classes >> 1) & 1
    return torch.where(classes < 0, classes, classes & ~3 | bits)


def stats_side_kernel(
    inputs: Inputs, upstream: Upstream, other: Tensor, wanted: bool, apart: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of derivative * other for every row [N, D] float32 (without rows where they are not
    wanted), the sum of derivative * dot [] float64, and what rounding took from the sums of
    derivatives of every row [N], where they were rounded."""
    (num_rows, num_cols), features = inputs.shape, inputs.x.shape[1]
    config = side_config(other.dtype, features)
    out = other.new_empty((num_rows if wanted else 0, features), dtype=torch.float32)
    row_ranges = block_ranges(upstream.rows[0], config.block_m)
    scale_parts = out.new_empty(row_ranges.shape[0])
    lost = out.new_empty(num_rows) if wanted and other.dtype != torch.float32 else None
    _stats_side_kernel[(row_ranges.shape[0],)](
        inputs.x, inputs.y, other, inputs.factor, *inputs.numbers(), *inputs.ranges(config),
        row_ranges, block_ranges(upstream.cols[0], config.block_n), upstream.rows, upstream.cols,
        out, scale_parts, lost, num_rows, num_cols, features, upstream.rows.stride(0),
        upstream.cols.stride(0), inputs.margin, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, EVEN_K=features % config.block_k == 0,
        BLOCK_D=config.block_d, EVEN_D=features == config.block_d,
        HAS_CLASSES=inputs.row_class is not None, HAS_MASKS=inputs.row_mask is not None,
        TOTALS=inputs.totals, GRADIENT=wanted, APART=apart, INTERPRETED=INTERPRETED,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, scale_parts.sum(dtype=torch.float64), lost
