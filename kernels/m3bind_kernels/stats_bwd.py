"""similarity_stats, backward: gradients of features and scale from the statistics.

In waves of rows: a kernel recomputes the tiles' logits and stores the derivative by every dot
product, as float16 where features are 16-bit; two library GEMMs make gradients of it, accumulated
in float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.launch import INTERPRETED, Inputs, block_ranges, descriptors_fit, launch
from m3bind_kernels.products import add_product, as_float16, product
from m3bind_kernels.tiles import dot_products, is_special, pair_rules, pieces_of, tile_at
from m3bind_kernels.tuning import choose
from m3bind_kernels.upstream import Upstream, add_partners, partners

# Derivatives of one wave. The float32 gradient of y is read and written once a wave, so a wave that
# stays in L2 costs more than it saves where it has few rows.
WAVE_BYTES = 128 << 20
WAVE_ROWS = 1024
# Up to this many pairs the derivatives stay float32: the time is that of the launches anyway, and
# few pairs do not average the rounding to 16 bit out.
PRECISE_PAIRS = 1 << 20


@triton.jit
def _softmax_terms(
    logits, not_in_row, not_in_col, row_shift, col_shift, row_weight, col_weight, high,
    one_exponential, SOME_OUT: tl.constexpr,
):  # fmt: skip
    """row_weight * 2^(logit - row_shift) + the same of the columns, where a pair is in them."""
    if one_exponential:
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
def _stats_bwd_kernel(
    x, y,  # pointers [N, D], [M, D]
    factor,  # [1] float32: logits in base 2 are factor * (dot - margin * positive)
    row_class, col_class, row_mask, col_mask,  # [N] or [M] int32
    row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,  # [tiles, 2]
    row_shift_ranges, col_shift_ranges,  # [tiles, 2] float32
    row_vectors, col_vectors,  # [4, N], [4, M] float32: shift, weight, positives', totals' gradient
    out,  # [N, M] derivatives by the dot products
    scale_parts,  # [tiles] float32: sums of derivative * dot
    num_rows, num_cols, num_features, row_stride, col_stride, out_stride, margin,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, HAS_CLASSES: tl.constexpr, HAS_MASKS: tl.constexpr, TOTALS: tl.constexpr,
    APART: tl.constexpr,  # whether pairs with both bits are left to the caller
    DESCRIPTORS: tl.constexpr, STORE_BY_DESCRIPTOR: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    if DESCRIPTORS:
        x_tiles = tl.make_tensor_descriptor(
            x, [num_rows, num_features], [num_features, 1], [BLOCK_M, BLOCK_K]
        )
        y_tiles = tl.make_tensor_descriptor(
            y, [num_cols, num_features], [num_features, 1], [BLOCK_N, BLOCK_K]
        )
    else:
        x_tiles = x
        y_tiles = y
    if STORE_BY_DESCRIPTOR:
        out_tiles = tl.make_tensor_descriptor(
            out, [num_rows, num_cols], [out_stride, 1], [BLOCK_M, PIECE]
        )
    tiles_n = tl.cdiv(num_rows, BLOCK_M)
    tiles_m = tl.cdiv(num_cols, BLOCK_N)
    base2 = tl.load(factor)
    # Otherwise flattening the loops makes a second epilogue, for tiles without any feature.
    tl.assume(num_features > 0)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_m, tl.num_programs(0), flatten=True):
        row_tile, col_tile = tile_at(tile, tiles_n, tiles_m, 8)
        dots = dot_products(
            x_tiles, y_tiles, row_tile * BLOCK_M, col_tile * BLOCK_N, num_rows, num_cols,
            num_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_at = row_vectors + rows
        row_shift = tl.load(row_at, mask=rows < num_rows, other=0.0)
        row_weight = tl.load(row_at + row_stride, mask=rows < num_rows, other=0.0)
        row_range = row_shift_ranges + 2 * row_tile
        col_range = col_shift_ranges + 2 * col_tile
        low = tl.minimum(tl.load(row_range), tl.load(col_range))
        high = tl.maximum(tl.load(row_range + 1), tl.load(col_range + 1))
        # No logit is then above `high`, and what underflows (at 2^-126) is below 2^-62 of its row
        # and column. Where they are further apart one exponential would make inf * 0.
        one_exponential = high - low <= 64.0
        special = is_special(
            row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,
            row_tile, col_tile, num_rows, num_cols, BLOCK_M, BLOCK_N, HAS_CLASSES, HAS_MASKS,
        )  # fmt: skip
        by_scale = tl.zeros([BLOCK_M], tl.float32)
        pieces = pieces_of(dots, BLOCK_M, BLOCK_N, PIECE)
        for p in tl.static_range(BLOCK_N // PIECE):
            part = pieces[p]
            cols = col_tile * BLOCK_N + p * PIECE + tl.arange(0, PIECE)
            col_at = col_vectors + cols
            col_shift = tl.load(col_at, mask=cols < num_cols, other=0.0)
            col_weight = tl.load(col_at + col_stride, mask=cols < num_cols, other=0.0)
            if special:
                left_out, positive, not_in_row, not_in_col = pair_rules(
                    row_class, col_class, row_mask, col_mask, rows, cols, num_rows, num_cols,
                    HAS_CLASSES, HAS_MASKS,
                )  # fmt: skip
                if HAS_CLASSES:
                    part = tl.where(positive, part - margin, part)
                grad = _softmax_terms(
                    part * base2, left_out | not_in_row, left_out | not_in_col,
                    row_shift, col_shift, row_weight, col_weight, high, one_exponential, True,
                )  # fmt: skip
                if HAS_CLASSES:
                    row_grad = tl.load(row_at + 2 * row_stride, mask=rows < num_rows, other=0.0)
                    col_grad = tl.load(col_at + 2 * col_stride, mask=cols < num_cols, other=0.0)
                    grad += tl.where(positive, row_grad[:, None] + col_grad[None, :], 0.0)
                if TOTALS:
                    row_grad = tl.load(row_at + 3 * row_stride, mask=rows < num_rows, other=0.0)
                    col_grad = tl.load(col_at + 3 * col_stride, mask=cols < num_cols, other=0.0)
                    grad += tl.where(left_out, 0.0, row_grad[:, None] + col_grad[None, :])
                by_scale += tl.sum(grad * part, 1)
                if APART:
                    grad = tl.where(not_in_row & not_in_col, 0.0, grad)
            else:
                grad = _softmax_terms(
                    part * base2, 0, 0, row_shift, col_shift, row_weight, col_weight,
                    high, one_exponential, False,
                )  # fmt: skip
                if TOTALS:
                    row_grad = tl.load(row_at + 3 * row_stride)
                    col_grad = tl.load(col_at + 3 * col_stride)
                    grad += row_grad[:, None] + col_grad[None, :]
                by_scale += tl.sum(grad * part, 1)
            rounded = grad.to(out.dtype.element_ty)
            if STORE_BY_DESCRIPTOR:
                first_col = col_tile * BLOCK_N + p * PIECE
                out_tiles.store([row_tile * BLOCK_M, first_col], rounded)
            else:
                at = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
                inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
                tl.store(at, rounded, mask=inside)
        tl.store(scale_parts + tile, tl.sum(by_scale, 0))


def stats_bwd_kernel(
    inputs: Inputs, band: slice, upstream: Upstream, ranges: list[Tensor], apart: bool,
    out: Tensor, scale_parts: Tensor, config: Config,
) -> None:  # fmt: skip
    """Fills `out` [rows of the band, M] with derivatives by the dot products, and the parts of the
    scale's gradient, one a tile. `ranges`: of the shifts of the band's rows and of the columns."""
    part = inputs.rows(band)
    num_rows, num_cols = part.shape
    use_descriptors = descriptors_fit(inputs)
    row_vectors = upstream.rows[:, band]
    launch(
        _stats_bwd_kernel, config, num_rows, num_cols,
        part.x, part.y, part.factor, *part.numbers(), *part.ranges(config), *ranges,
        row_vectors, upstream.cols, out, scale_parts, num_rows, num_cols, part.x.shape[1],
        row_vectors.stride(0), upstream.cols.stride(0), out.stride(0), part.margin,
        EVEN_K=part.x.shape[1] % config.block_k == 0, HAS_CLASSES=part.row_class is not None,
        HAS_MASKS=part.row_mask is not None, TOTALS=part.totals, APART=apart,
        DESCRIPTORS=use_descriptors,
        STORE_BY_DESCRIPTOR=use_descriptors and out.dtype != torch.float32,
        INTERPRETED=INTERPRETED,
    )  # fmt: skip


def similarity_stats_bwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    row_class: Tensor | None,  # [N] int32
    col_class: Tensor | None,  # [M] int32
    row_mask: Tensor | None,  # [N] int32
    col_mask: Tensor | None,  # [M] int32
    margin: float,
    totals: bool,
    row_lse: Tensor,  # [N] float64
    col_lse: Tensor,  # [M] float64
    kept: Tensor,  # [0, M]
    grad_rows: Tensor,  # [3, N]
    grad_cols: Tensor,  # [3, M]
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [M, D], [] float32
    """Gradients of x, y and the scale; one that is not needed comes back empty, [0, D]."""
    inputs = Inputs.of(x, y, logit_scale, row_class, col_class, row_mask, col_mask, margin, totals)
    grad_x = inputs.x.new_zeros((inputs.shape[0] if need_x else 0, x.shape[1]))
    total_y = y.new_zeros((inputs.shape[1] if need_y else 0, x.shape[1]), dtype=torch.float32)
    if 0 in inputs.shape:
        return grad_x, total_y.to(y.dtype), total_y.new_zeros(())
    upstream = Upstream.of(row_lse, col_lse, grad_rows, grad_cols, inputs.nats())
    with torch.cuda.device_of(x):
        grad_scale = _fill(inputs, upstream, grad_x, total_y)
    return grad_x, total_y.to(y.dtype), grad_scale


def _fill(inputs: Inputs, upstream: Upstream, grad_x: Tensor, grad_y: Tensor) -> Tensor:
    """Fills the gradients of the features, where they have rows; returns that of the scale."""
    precise = inputs.x.dtype == torch.float32 or math.prod(inputs.shape) <= PRECISE_PAIRS
    back_x = back_y = inputs.scale / upstream.factor
    if precise:
        other_x, other_y = inputs.x.float(), inputs.y.float()
    else:
        other_x, factor_x = as_float16(inputs.x)
        other_y, factor_y = as_float16(inputs.y)
        back_x, back_y = back_x / factor_y, back_y / factor_x
    row_partner = col_partner = None
    if not precise and inputs.x.dtype == torch.float16:
        # Rounded like the gradient itself, the largest derivatives would be most of its error.
        row_partner = partners(inputs.row_class, inputs.col_class)
        col_partner = partners(inputs.col_class, inputs.row_class)

    def derive(band: slice, out: Tensor, config: Config) -> Tensor:
        """The derivatives by some rows' dot products; returns the scale's gradient from them."""
        row_ranges = block_ranges(upstream.rows[0, band], config.block_m)
        ranges = [row_ranges, block_ranges(upstream.cols[0], config.block_n)]
        scale_parts = upstream.cols.new_empty(row_ranges.shape[0] * ranges[1].shape[0])
        apart = row_partner is not None
        stats_bwd_kernel(inputs, band, upstream, ranges, apart, out, scale_parts, config)
        return scale_parts.sum(dtype=torch.float64)

    def first_wave(_: Inputs, config: Config) -> None:
        derive(*_waves(inputs, other_x.dtype, config)[0], config)

    config = choose("stats_bwd", inputs, first_wave)
    by_scale = []
    for band, out in _waves(inputs, other_x.dtype, config):
        by_scale.append(derive(band, out, config))
        if grad_x.shape[0] > 0:
            part = product(out, other_y)
            if row_partner is not None:
                add_partners(
                    part, row_partner[band], upstream.rows[:, band], upstream.cols, inputs.y
                )
            grad_x[band] = part.mul_(back_x)
        if grad_y.shape[0] > 0:
            add_product(grad_y, out.T, other_x[band])
    if grad_y.shape[0] > 0:
        if col_partner is not None:
            add_partners(grad_y, col_partner, upstream.cols, upstream.rows, inputs.x)
        grad_y.mul_(back_y)
    return (torch.stack(by_scale).sum() / upstream.factor).float()


def _waves(inputs: Inputs, dtype: torch.dtype, config: Config) -> list[tuple[slice, Tensor]]:
    """Bands of rows, and the buffer for the derivatives of each: the same memory every time."""
    num_rows, num_cols = inputs.shape
    stride = triton.cdiv(num_cols, 16) * 16  # so that rows are aligned for wide stores
    fitting = WAVE_BYTES // (stride * dtype.itemsize)
    step = max(fitting, WAVE_ROWS) // config.block_m * config.block_m
    buffer = inputs.x.new_empty((min(step, num_rows), stride), dtype=dtype)
    return [
        (slice(i, end), buffer[: end - i, :num_cols])
        for i in range(0, num_rows, step)
        for end in (min(i + step, num_rows),)
    ]
