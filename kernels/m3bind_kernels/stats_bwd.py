"""similarity_stats, backward: gradients of features and scale from the statistics.

Of few features one side after the other, see `stats_side`. Otherwise in waves of rows: a kernel
recomputes the tiles' logits and stores the derivative by every dot product, of which `waves` makes
gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels import hopper
from m3bind_kernels.configs import Config
from m3bind_kernels.derivatives import derivatives, one_exponential
from m3bind_kernels.kept import Kept, kept_bwd_kernel
from m3bind_kernels.launch import Inputs, block_ranges, launch
from m3bind_kernels.stats_far import far_config
from m3bind_kernels.stats_side import by_sides, exchanged, stats_side_kernel
from m3bind_kernels.tiles import dot_products, is_special, pieces_of, tile_at
from m3bind_kernels.tuning import choose
from m3bind_kernels.upstream import Upstream, partner_derivatives
from m3bind_kernels.waves import Gradients


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
    row_lost, col_lost,  # [column tiles, N], [row tiles, M] float32 or None: lost in rounding
    listed, num_listed,  # [tiles], [1] int32: the tiles to go over; None: all
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
    total = tiles_n * tiles_m
    if listed is not None:
        total = tl.load(num_listed)
    for number in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=True):
        tile = number
        if listed is not None:
            tile = tl.load(listed + number)
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
        one = one_exponential(low, high)
        special = is_special(
            row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,
            row_tile, col_tile, num_rows, num_cols, BLOCK_M, BLOCK_N, HAS_CLASSES, HAS_MASKS,
        )  # fmt: skip
        by_scale = tl.zeros([BLOCK_M], tl.float32)
        lost = tl.zeros([BLOCK_M], tl.float32)
        pieces = pieces_of(dots, BLOCK_M, BLOCK_N, PIECE)
        for p in tl.static_range(BLOCK_N // PIECE):
            cols = col_tile * BLOCK_N + p * PIECE + tl.arange(0, PIECE)
            grad, by_dot = derivatives(
                pieces[p], row_class, col_class, row_mask, col_mask, rows, cols, num_rows,
                num_cols, row_at, col_vectors + cols, row_stride, col_stride, row_shift,
                row_weight, base2, margin, high, one, special,
                HAS_CLASSES, HAS_MASKS, TOTALS, APART,
            )  # fmt: skip
            by_scale += by_dot
            rounded = grad.to(out.dtype.element_ty)
            if row_lost is not None:
                left = grad - rounded.to(tl.float32)
                lost += tl.sum(left, 1)
                at = col_lost + row_tile.to(tl.int64) * num_cols + cols
                tl.store(at, tl.sum(left, 0), mask=cols < num_cols)
            if STORE_BY_DESCRIPTOR:
                first_col = col_tile * BLOCK_N + p * PIECE
                out_tiles.store([row_tile * BLOCK_M, first_col], rounded)
            else:
                at = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
                inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
                tl.store(at, rounded, mask=inside)
        tl.store(scale_parts + tile, tl.sum(by_scale, 0))
        if row_lost is not None:
            at = row_lost + col_tile.to(tl.int64) * num_rows + rows
            tl.store(at, lost, mask=rows < num_rows)


def stats_bwd_kernel(
    inputs: Inputs, band: slice, upstream: Upstream, ranges: list[Tensor], apart: bool,
    out: Tensor, scale_parts: Tensor, row_lost: Tensor, col_lost: Tensor, kept: Kept | None,
    config: Config,
) -> None:  # fmt: skip
    """Fills `out` [rows of the band, M] with derivatives by the dot products, the parts of the
    scale's gradient, one a tile, and what rounding takes from the sums of rows and columns in each
    tile. `ranges`: of the shifts of the band's rows and of the columns."""
    part = inputs.rows(band)
    row_vectors = upstream.rows[:, band]
    if config == hopper.TILE and kept is None:
        hopper.stats_bwd(
            part, ranges, row_vectors, upstream.cols, apart, out, scale_parts, row_lost, col_lost
        )
        return
    constants = part.constants(config)
    lost = (None, None) if out.dtype == torch.float32 else (row_lost, col_lost)
    listed: tuple[Tensor | None, Tensor | None] = (None, None)
    if kept is not None:
        listed = kept_bwd_kernel(kept, ranges, row_vectors, upstream.cols, out, scale_parts, lost)
        config = far_config(config)
    launch(
        _stats_bwd_kernel, config, *part.shape,
        part.x, part.y, part.factor, *part.numbers(), *part.ranges(config), *ranges,
        row_vectors, upstream.cols, out, scale_parts, *lost,
        *listed, *part.shape, part.x.shape[1],
        row_vectors.stride(0), upstream.cols.stride(0), out.stride(0), part.margin,
        HAS_CLASSES=part.row_class is not None, TOTALS=part.totals, APART=apart,
        STORE_BY_DESCRIPTOR=constants["DESCRIPTORS"] and out.dtype != torch.float32, **constants,
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
    kept: Tensor,  # memory of `Kept`
    grad_rows: Tensor,  # [3, N]
    grad_cols: Tensor,  # [3, M]
    need_x: bool,
    need_y: bool,
    native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [M, D], [] float32
    """Gradients of x, y and the scale; one that is not needed comes back empty, [0, D]."""
    inputs = Inputs.of(
        x, y, logit_scale, row_class, col_class, row_mask, col_mask, margin, totals, native
    )
    grads = Gradients(inputs, need_x, need_y, x.dtype)
    if 0 in inputs.shape:
        return grads.x, grads.y.to(y.dtype), grads.y.new_zeros(())
    upstream = Upstream.of(row_lse, col_lse, grad_rows, grad_cols, inputs.nats())
    with torch.cuda.device_of(x):
        if by_sides(inputs):
            grad_scale = _fill_by_sides(grads, upstream)
        else:
            grad_scale = _fill_by_waves(grads, upstream, Kept.of(inputs, kept))
    return grads.x, grads.y.to(y.dtype), grad_scale


def _fill_by_waves(grads: Gradients, upstream: Upstream, kept: Kept | None) -> Tensor:
    """Fills the gradients of the features; returns that of the scale."""
    inputs = grads.inputs
    back = inputs.scale / upstream.factor

    def derive(
        band: slice, out: Tensor, config: Config, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives by some rows' dot products. Returns the scale's gradient from them, and
        what rounding took from the sums of rows and columns."""
        row_ranges = block_ranges(upstream.rows[0, band], config.block_m)
        ranges = [row_ranges, block_ranges(upstream.cols[0], config.block_n)]
        tiles_n, tiles_m = (found.shape[0] for found in ranges)
        scale_parts = upstream.cols.new_empty(tiles_n * tiles_m)
        row_lost = scale_parts.new_empty(0 if grads.precise else tiles_m, out.shape[0])
        col_lost = scale_parts.new_empty(0 if grads.precise else tiles_n, out.shape[1])
        stats_bwd_kernel(
            inputs, band, upstream, ranges, grads.apart, out, scale_parts, row_lost, col_lost,
            None if kept is None else kept.rows(band), config,
        )  # fmt: skip
        return scale_parts.sum(dtype=torch.float64), row_lost.sum(0), col_lost.sum(0)

    def first_wave(_: Inputs, config: Config) -> None:
        derive(*grads.waves(config)[0], config)

    rounded = inputs.native and not grads.precise
    if kept is not None:
        config = kept.config if rounded else far_config(kept.config)
    else:
        config = hopper.TILE if rounded else choose("stats_bwd", inputs, first_wave)
    by_scale, cols_lost = [], []
    for band, out in grads.waves(config):
        by_dot, row_lost, col_lost = derive(band, out, config, kept)
        by_scale.append(by_dot)
        cols_lost.append(col_lost)
        lone = None
        if grads.row_partner is not None:
            rows = upstream.rows[:, band]
            lone = partner_derivatives(grads.row_partner[band], rows, upstream.cols)
        grads.add(band, out, back, lone, row_lost)
    lone = None
    if grads.col_partner is not None:
        lone = partner_derivatives(grads.col_partner, upstream.cols, upstream.rows)
    grads.finish(back, lone, torch.stack(cols_lost).sum(0))
    return (torch.stack(by_scale).sum() / upstream.factor).float()


def _fill_by_sides(grads: Gradients, upstream: Upstream) -> Tensor:
    """The same for few features, without waves."""
    inputs = grads.inputs
    back = inputs.scale / upstream.factor
    need_x, need_y = grads.x.shape[0] > 0, grads.y.shape[0] > 0
    by_scale = lost = None
    if need_x or not need_y:
        found, by_scale, lost = stats_side_kernel(
            inputs, upstream, grads.other_y, need_x, grads.apart
        )
        if need_x:
            lone = None
            if grads.row_partner is not None:
                lone = partner_derivatives(grads.row_partner, upstream.rows, upstream.cols)
            grads.set_rows(slice(None), found, back, lone, lost)
    if need_y:
        found, by_dot, lost = stats_side_kernel(
            exchanged(inputs), upstream.exchanged(), grads.other_x, True, grads.apart
        )
        by_scale = by_dot if by_scale is None else by_scale
        grads.y = found
    lone = None
    if grads.col_partner is not None:
        lone = partner_derivatives(grads.col_partner, upstream.cols, upstream.rows)
    grads.finish(back, lone, lost)
    assert by_scale is not None
    return (by_scale / upstream.factor).float()
