"""siglip: losses of all pairs, derivatives by their dot products, or both in one pass.

Each tile forms its logits; a row's losses are summed over the columns of a tile, and derivatives
are stored for the two GEMMs of `waves`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels import hopper
from m3bind_kernels.configs import Config
from m3bind_kernels.launch import Inputs, launch
from m3bind_kernels.sigmoid import exp_below_zero, sigmoid_of, softplus_of
from m3bind_kernels.tiles import dot_products, is_special, pair_rules, pieces_of, tile_at


@triton.jit
def _siglip_kernel(
    x, y,  # pointers [N, D], [M, D]
    logits,  # [2] float32: scale and bias
    row_class, col_class, row_mask, col_mask,  # [N] or [M] int32
    row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,  # [tiles, 2]
    losses,  # [tiles_m, N] float32: sums of a row's losses
    weights,  # [N] float32: of each row's derivatives
    boost, wanted,  # [1] float32, by which derivatives are multiplied; [1] int32, 0: do nothing
    out,  # [N, M] derivatives by the dot products
    lone,  # [N] float32: the derivative at a pair that is alone in its class
    sums,  # [3, tiles] float32: derivatives, derivatives * dots; largest derivative
    num_rows, num_cols, num_features, out_stride, plane,  # plane: of `sums`
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, HAS_CLASSES: tl.constexpr, HAS_MASKS: tl.constexpr, LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    APART: tl.constexpr,  # whether derivatives at lone pairs go to `lone`
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
    scale = tl.load(logits)
    bias = tl.load(logits + 1)
    last = tiles_n * tiles_m
    if GRADIENT:
        larger = tl.load(boost)
        last = tl.where(tl.load(wanted) == 0, 0, last)
    # Otherwise flattening the loops makes a second epilogue, for tiles without any feature.
    tl.assume(num_features > 0)
    for tile in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=True):
        row_tile, col_tile = tile_at(tile, tiles_n, tiles_m, 8)
        dots = dot_products(
            x_tiles, y_tiles, row_tile * BLOCK_M, col_tile * BLOCK_N, num_rows, num_cols,
            num_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        special = is_special(
            row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,
            row_tile, col_tile, num_rows, num_cols, BLOCK_M, BLOCK_N, HAS_CLASSES, HAS_MASKS,
        )  # fmt: skip
        loss = tl.zeros([BLOCK_M], tl.float32)
        if GRADIENT:
            weight = tl.load(weights + rows, mask=rows < num_rows, other=0.0)[:, None]
            total = tl.zeros([BLOCK_M], tl.float32)
            by_scale = tl.zeros([BLOCK_M], tl.float32)
            largest = tl.zeros([BLOCK_M], tl.float32)
        pieces = pieces_of(dots, BLOCK_M, BLOCK_N, PIECE)
        for p in tl.static_range(BLOCK_N // PIECE):
            part = pieces[p]
            cols = col_tile * BLOCK_N + p * PIECE + tl.arange(0, PIECE)
            signed = part * scale + bias
            if special:
                left_out, positive, not_in_row, not_in_col = pair_rules(
                    row_class, col_class, row_mask, col_mask, rows, cols, num_rows, num_cols,
                    HAS_CLASSES, HAS_MASKS,
                )  # fmt: skip
                if HAS_CLASSES:
                    signed = tl.where(positive, -signed, signed)
                power = exp_below_zero(-tl.abs(signed))
                if LOSS:
                    loss += tl.sum(tl.where(left_out, 0.0, softplus_of(signed, power)), 1)
                if GRADIENT:
                    grad = tl.where(left_out, 0.0, sigmoid_of(signed, power)) * weight
                    if HAS_CLASSES:
                        grad = tl.where(positive, -grad, grad)
                    total += tl.sum(grad, 1)
                    by_scale += tl.sum(grad * part, 1)
                    if APART:
                        alone = not_in_row & not_in_col
                        found = tl.max(alone.to(tl.int32), 1) > 0
                        tl.store(lone + rows, tl.sum(tl.where(alone, grad, 0.0), 1), mask=found)
                        grad = tl.where(alone, 0.0, grad)
            else:
                power = exp_below_zero(-tl.abs(signed))
                if LOSS:
                    loss += tl.sum(softplus_of(signed, power), 1)
                if GRADIENT:
                    grad = sigmoid_of(signed, power) * weight
                    total += tl.sum(grad, 1)
                    by_scale += tl.sum(grad * part, 1)
            if GRADIENT:
                largest = tl.maximum(largest, tl.max(tl.abs(grad), 1))
                rounded = (grad * larger).to(out.dtype.element_ty)
                if STORE_BY_DESCRIPTOR:
                    first_col = col_tile * BLOCK_N + p * PIECE
                    out_tiles.store([row_tile * BLOCK_M, first_col], rounded)
                else:
                    at = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
                    inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
                    tl.store(at, rounded, mask=inside)
        if LOSS:
            tl.store(losses + col_tile.to(tl.int64) * num_rows + rows, loss, mask=rows < num_rows)
        if GRADIENT:
            tl.store(sums + tile, tl.sum(total, 0))
            tl.store(sums + plane + tile, tl.sum(by_scale, 0))
            tl.store(sums + 2 * plane + tile, tl.max(largest, 0))


def siglip_kernel(
    part: Inputs,
    logits: Tensor,  # [2] float32
    config: Config,
    *,
    losses: Tensor | None = None,  # [tiles_m, N]
    weights: Tensor | None = None,  # [N]
    boost: Tensor | None = None,  # [1] float32
    wanted: Tensor | None = None,  # [1] int32
    out: Tensor | None = None,  # [N, M]
    lone: Tensor | None = None,  # [N]
    sums: Tensor | None = None,  # [3, tiles]
) -> None:
    """Fills what is given, for a band of rows: `losses`, or all that belongs to derivatives."""
    if config == hopper.TILE:
        hopper.siglip(part, logits, losses, weights, boost, wanted, out, lone, sums)
        return
    constants = part.constants(config)
    stride = 0 if out is None else out.stride(0)
    by_descriptor = constants["DESCRIPTORS"] and out is not None and out.dtype != torch.float32
    launch(
        _siglip_kernel, config, *part.shape,
        part.x, part.y, logits, *part.numbers(), *part.ranges(config), losses, weights,
        boost, wanted, out, lone, sums,
        *part.shape, part.x.shape[1], stride, 0 if sums is None else sums.stride(0),
        HAS_CLASSES=part.row_class is not None, LOSS=losses is not None,
        GRADIENT=out is not None, APART=lone is not None, STORE_BY_DESCRIPTOR=by_descriptor,
        **constants,
    )  # fmt: skip
