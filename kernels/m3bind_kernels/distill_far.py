"""The tiles of similarity_distill's forward pass in which one shift for all logits loses some.

As stats_far: it runs on the tiles that the forward kernel named (usually none), and shifts every
row and every column by its own maxima.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.distill_sides import Sides
from m3bind_kernels.divergence import moved, pairs_left_out, store_sums, sums_by_own_shifts
from m3bind_kernels.launch import launch
from m3bind_kernels.tiles import dot_products, tile_at


@triton.jit
def _distill_far_kernel(
    x, y, teacher_x, teacher_y, factors, row_mask, col_mask, row_mask_ranges, col_mask_ranges,
    row_parts, col_parts, far, num_rows, num_cols, num_features, teacher_features, row_plane,
    col_plane,  # as of the forward kernel
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, HAS_MASKS: tl.constexpr, KL: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(num_rows, BLOCK_M)
    tiles_m = tl.cdiv(num_cols, BLOCK_N)
    factor, teacher_factor = tl.load(factors), tl.load(factors + 1)
    for tile in range(tl.program_id(0), tiles_n * tiles_m, tl.num_programs(0)):
        if tl.load(far + tile) != 0:
            row_tile, col_tile = tile_at(tile, tiles_n, tiles_m, 8)
            first_row = row_tile * BLOCK_M
            rows = first_row + tl.arange(0, BLOCK_M)
            row_s = tl.full([BLOCK_M], -float("inf"), tl.float32)
            row_t = tl.full([BLOCK_M], -float("inf"), tl.float32)
            student = tl.zeros([BLOCK_M], tl.float32)
            teacher = tl.zeros([BLOCK_M], tl.float32)
            change = tl.zeros([BLOCK_M], tl.float32)
            cross = tl.zeros([BLOCK_M], tl.float32)
            for piece in range(BLOCK_N // PIECE):
                first_col = col_tile * BLOCK_N + piece * PIECE
                logits = factor * dot_products(
                    x, y, first_row, first_col, num_rows, num_cols, num_features,
                    BLOCK_M, PIECE, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
                )  # fmt: skip
                aims = teacher_factor * dot_products(
                    teacher_x, teacher_y, first_row, first_col, num_rows, num_cols,
                    teacher_features, BLOCK_M, PIECE, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
                )  # fmt: skip
                cols = first_col + tl.arange(0, PIECE)
                left_out = pairs_left_out(
                    row_mask, col_mask, rows, cols, num_rows, num_cols, HAS_MASKS
                )
                shift_s, shift_t, more_s, more_t, more_change, more_cross = sums_by_own_shifts(
                    logits, aims, left_out, 0, KL
                )
                store_sums(
                    col_parts + row_tile.to(tl.int64) * num_cols + cols, col_plane, cols < num_cols,
                    shift_s, shift_t, more_s, more_t, more_change, more_cross,
                )  # fmt: skip
                shift_s, shift_t, more_s, more_t, more_change, more_cross = sums_by_own_shifts(
                    logits, aims, left_out, 1, KL
                )
                top_s, top_t = tl.maximum(row_s, shift_s), tl.maximum(row_t, shift_t)
                student, teacher, change, cross = moved(
                    row_s, row_t, student, teacher, change, cross, top_s, top_t, KL
                )
                more_s, more_t, more_change, more_cross = moved(
                    shift_s, shift_t, more_s, more_t, more_change, more_cross, top_s, top_t, KL
                )
                row_s, row_t = top_s, top_t
                student += more_s
                teacher += more_t
                change += more_change
                cross += more_cross
            store_sums(
                row_parts + col_tile.to(tl.int64) * num_rows + rows, row_plane, rows < num_rows,
                row_s, row_t, student, teacher, change, cross,
            )  # fmt: skip


def far_config(config: Config) -> Config:
    """The forward kernel's tiles, in steps over the features and pieces that do not spill."""
    return replace(config, block_k=min(config.block_k, 32), piece=max(config.piece, 16))


def distill_far_kernel(
    part: Sides, row_parts: Tensor, col_parts: Tensor, far: Tensor, kl: bool, config: Config
) -> None:
    """Corrects the partial sums in the tiles that `far` names."""
    config = far_config(config)
    launch(
        _distill_far_kernel, config, *part.student.shape,
        *part.pointers(), *part.masks(config), row_parts, col_parts, far, *part.sizes(),
        row_parts.stride(0), col_parts.stride(0), KL=kl,
        **(part.constants(config) | {"DESCRIPTORS": False}),
    )  # fmt: skip
