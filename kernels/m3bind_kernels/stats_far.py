"""The tiles of the forward pass whose logits lie so far apart that one shift loses some of them.

Runs after the forward kernel, on the few tiles that it named (usually none): every row and every
column is shifted by its own maximum, with two exponentials a logit.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.launch import Inputs, launch
from m3bind_kernels.tiles import dot_products, finite_shift, pair_rules, tile_at


@triton.jit
def _sums_by_own_shift(logits, left_out, AXIS: tl.constexpr):
    """Sums of 2^(logit - shift), every row or column shifted by its own maximum; and the shifts."""
    logits = tl.where(left_out, -float("inf"), logits)
    highest = tl.max(logits, AXIS)
    power = tl.exp2(logits - tl.expand_dims(finite_shift(highest), AXIS))
    return tl.sum(power, AXIS), tl.ceil(highest)


@triton.jit
def _add_shifted(total, total_shift, more, more_shift):
    """Adds sums of powers that have been shifted; a shift of -inf is that of an empty sum."""
    highest = tl.maximum(total_shift, more_shift)
    base = finite_shift(highest)
    total = total * tl.exp2(total_shift - base) + more * tl.exp2(more_shift - base)
    return total, highest


@triton.jit
def _stats_far_kernel(
    x, y, factor, row_class, col_class, row_mask, col_mask, row_parts, col_parts, far,
    num_rows, num_cols, num_features, row_plane, col_plane, margin,  # as of the forward kernel
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, HAS_CLASSES: tl.constexpr, HAS_MASKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(num_rows, BLOCK_M)
    tiles_m = tl.cdiv(num_cols, BLOCK_N)
    base2 = tl.load(factor)
    for tile in range(tl.program_id(0), tiles_n * tiles_m, tl.num_programs(0)):
        if tl.load(far + tile) != 0:
            row_tile, col_tile = tile_at(tile, tiles_n, tiles_m, 8)
            rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            row_at = row_parts + col_tile.to(tl.int64) * num_rows + rows
            col_first = col_parts + row_tile.to(tl.int64) * num_cols
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            row_shift = tl.full([BLOCK_M], -float("inf"), tl.float32)
            for piece in range(BLOCK_N // PIECE):
                first_col = col_tile * BLOCK_N + piece * PIECE
                dots = dot_products(
                    x, y, row_tile * BLOCK_M, first_col, num_rows, num_cols,
                    num_features, BLOCK_M, PIECE, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
                )  # fmt: skip
                cols = first_col + tl.arange(0, PIECE)
                left_out, positive, not_in_row, not_in_col = pair_rules(
                    row_class, col_class, row_mask, col_mask, rows, cols, num_rows, num_cols,
                    HAS_CLASSES, HAS_MASKS,
                )  # fmt: skip
                if HAS_CLASSES:
                    dots = tl.where(positive, dots - margin, dots)
                more, more_shift = _sums_by_own_shift(dots * base2, left_out | not_in_row, 1)
                row_sum, row_shift = _add_shifted(row_sum, row_shift, more, more_shift)
                more, more_shift = _sums_by_own_shift(dots * base2, left_out | not_in_col, 0)
                tl.store(col_first + cols, more_shift, mask=cols < num_cols)
                tl.store(col_first + col_plane + cols, more, mask=cols < num_cols)
            tl.store(row_at, row_shift, mask=rows < num_rows)
            tl.store(row_at + row_plane, row_sum, mask=rows < num_rows)


def far_config(config: Config) -> Config:
    """The forward kernel's tiles, in pieces that do not spill."""
    return replace(config, piece=min(config.piece, 16))


def stats_far_kernel(
    part: Inputs, row_parts: Tensor, col_parts: Tensor, far: Tensor, config: Config
) -> None:
    """Corrects shifts and sums of powers in the tiles that `far` names."""
    config = far_config(config)
    launch(
        _stats_far_kernel, config, *part.shape,
        part.x, part.y, part.factor, *part.numbers(), row_parts, col_parts, far,
        *part.shape, part.x.shape[1], row_parts.stride(0), col_parts.stride(0), part.margin,
        HAS_CLASSES=part.row_class is not None,
        **(part.constants(config) | {"DESCRIPTORS": False}),
    )  # fmt: skip
