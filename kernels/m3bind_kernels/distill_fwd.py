"""similarity_distill, forward: both directions' divergences in one pass over both GEMMs.

A persistent kernel forms the logits of student and teacher tile by tile; each tile writes the sums
of its rows and columns that `divergence` describes, and the merge kernel adds them up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.distill_far import distill_far_kernel
from m3bind_kernels.distill_merge import (
    PLANES,
    distill_merge_kernel,
    divergences,
    empty_divergences,
)
from m3bind_kernels.distill_sides import Sides
from m3bind_kernels.divergence import pairs_left_out, shifts_above, store_sums, terms
from m3bind_kernels.launch import Inputs, launch
from m3bind_kernels.merge import bands, new_parts
from m3bind_kernels.tiles import (
    dot_products,
    finite_shift,
    is_special,
    pieces_of,
    tile_at,
)
from m3bind_kernels.tuning import choose


@triton.jit
def _highest(dots, factor):
    """The highest logit of a tile."""
    if factor < 0:
        found = tl.min(tl.min(dots, 1), 0) * factor
    else:
        found = tl.max(tl.max(dots, 1), 0) * factor
    return found


@triton.jit
def _distill_fwd_kernel(
    x, y, teacher_x, teacher_y,  # pointers [N, D], [M, D], [N, E], [M, E]
    factors,  # [2] float32: logits in base 2 are factor * dot
    row_mask, col_mask, row_mask_ranges, col_mask_ranges,  # [N], [M], [tiles, 2] int32
    row_parts, col_parts,  # [6, tiles_m, N], [6, tiles_n, M] float32
    far,  # [tiles] int32: where the sums are not good
    num_rows, num_cols, num_features, teacher_features, row_plane, col_plane,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, HAS_MASKS: tl.constexpr, KL: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    if DESCRIPTORS:
        x_tiles = tl.make_tensor_descriptor(
            x, [num_rows, num_features], [num_features, 1], [BLOCK_M, BLOCK_K]
        )
        y_tiles = tl.make_tensor_descriptor(
            y, [num_cols, num_features], [num_features, 1], [BLOCK_N, BLOCK_K]
        )
        teacher_x_tiles = tl.make_tensor_descriptor(
            teacher_x, [num_rows, teacher_features], [teacher_features, 1], [BLOCK_M, BLOCK_K]
        )
        teacher_y_tiles = tl.make_tensor_descriptor(
            teacher_y, [num_cols, teacher_features], [teacher_features, 1], [BLOCK_N, BLOCK_K]
        )
    else:
        x_tiles, y_tiles, teacher_x_tiles, teacher_y_tiles = x, y, teacher_x, teacher_y
    tiles_n = tl.cdiv(num_rows, BLOCK_M)
    tiles_m = tl.cdiv(num_cols, BLOCK_N)
    factor, teacher_factor = tl.load(factors), tl.load(factors + 1)
    for tile in range(tl.program_id(0), tiles_n * tiles_m, tl.num_programs(0)):
        row_tile, col_tile = tile_at(tile, tiles_n, tiles_m, 8)
        first_row, first_col = row_tile * BLOCK_M, col_tile * BLOCK_N
        student = dot_products(
            x_tiles, y_tiles, first_row, first_col, num_rows, num_cols, num_features,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
        teacher = dot_products(
            teacher_x_tiles, teacher_y_tiles, first_row, first_col, num_rows, num_cols,
            teacher_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_M)
        special = is_special(
            row_mask_ranges, col_mask_ranges, row_mask_ranges, col_mask_ranges,
            row_tile, col_tile, num_rows, num_cols, BLOCK_M, BLOCK_N, False, HAS_MASKS,
        )  # fmt: skip
        shift_s, shift_t = shifts_above(
            _highest(student, factor), _highest(teacher, teacher_factor)
        )
        shift_s, shift_t = finite_shift(shift_s), finite_shift(shift_t)
        student_pieces = pieces_of(student, BLOCK_M, BLOCK_N, PIECE)
        teacher_pieces = pieces_of(teacher, BLOCK_M, BLOCK_N, PIECE)
        row_student = tl.zeros([BLOCK_M], tl.float32)
        row_teacher = tl.zeros([BLOCK_M], tl.float32)
        row_change = tl.zeros([BLOCK_M], tl.float32)
        row_cross = tl.zeros([BLOCK_M], tl.float32)
        least = tl.full([PIECE], 1.0, tl.float32)
        for p in tl.static_range(BLOCK_N // PIECE):
            cols = first_col + p * PIECE + tl.arange(0, PIECE)
            e_s, e_t, change, cross = terms(
                student_pieces[p] * factor - shift_s,
                teacher_pieces[p] * teacher_factor - shift_t, KL,
            )  # fmt: skip
            if special:
                left_out = pairs_left_out(
                    row_mask, col_mask, rows, cols, num_rows, num_cols, HAS_MASKS
                )
                e_s = tl.where(left_out, 0.0, e_s)
                e_t = tl.where(left_out, 0.0, e_t)
                change = tl.where(left_out, 0.0, change)
                cross = tl.where(left_out, 0.0, cross)
            row_student += tl.sum(e_s, 1)
            row_teacher += tl.sum(e_t, 1)
            row_change += tl.sum(change, 1)
            row_cross += tl.sum(cross, 1)
            col_student, col_teacher = tl.sum(e_s, 0), tl.sum(e_t, 0)
            smaller = tl.minimum(col_student, col_teacher)
            least = tl.minimum(least, tl.where(cols < num_cols, smaller, 1.0))
            zeros = tl.zeros([PIECE], tl.float32)
            store_sums(
                col_parts + row_tile.to(tl.int64) * num_cols + cols, col_plane, cols < num_cols,
                zeros + shift_s, zeros + shift_t, col_student, col_teacher, tl.sum(change, 0),
                tl.sum(cross, 0),
            )  # fmt: skip
        smaller = tl.minimum(row_student, row_teacher)
        smaller = tl.min(tl.where(rows < num_rows, smaller, 1.0), 0)
        # As in stats_fwd; tl.minimum passes a NaN over that is in one of the sums only, and that
        # NaN is then in the sums as it should be.
        tl.store(far + tile, ((tl.minimum(smaller, tl.min(least, 0)) >= 5.4e-20) == 0).to(tl.int32))
        zeros = tl.zeros([BLOCK_M], tl.float32)
        store_sums(
            row_parts + col_tile.to(tl.int64) * num_rows + rows, row_plane, rows < num_rows,
            zeros + shift_s, zeros + shift_t, row_student, row_teacher, row_change, row_cross,
        )  # fmt: skip


def distill_fwd_kernel(
    part: Sides, row_parts: Tensor, col_parts: Tensor, far: Tensor, kl: bool, config: Config
) -> None:
    """Fills the partial sums [6, tiles, N or M] of a band of rows. They are not good in tiles that
    `far` [tiles] then names."""
    launch(
        _distill_fwd_kernel, config, *part.student.shape,
        *part.pointers(), *part.masks(config), row_parts, col_parts, far, *part.sizes(),
        row_parts.stride(0), col_parts.stride(0), KL=kl, **part.constants(config),
    )  # fmt: skip


def similarity_distill_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    teacher_x: Tensor,  # [N, E]
    teacher_y: Tensor,  # [M, E]
    teacher_scale: Tensor,  # []
    row_mask: Tensor | None,  # [N] int32
    col_mask: Tensor | None,  # [M] int32
    kl: bool,
    kept_rows: int,
) -> tuple[Tensor, ...]:  # [N], [M], [2, N], [2, M], all float64; [2, 0, M] float32
    """Divergences of rows and columns, log-sum-exps of student and teacher; nothing is kept."""
    sides = Sides.of(
        x, y, logit_scale, teacher_x, teacher_y, teacher_scale, row_mask, col_mask
    )  # fmt: skip
    rows, cols = (empty_divergences(sides.factors, count) for count in sides.student.shape)
    if 0 not in sides.student.shape:
        with torch.cuda.device_of(x):
            _fill(sides, kl, rows, cols)
    row_loss, row_lse = divergences(rows, kl)
    col_loss, col_lse = divergences(cols, kl)
    return row_loss, col_loss, row_lse, col_lse, sides.factors.new_empty(2, 0, y.shape[0])


def _fill(sides: Sides, kl: bool, row_state: Tensor, col_state: Tensor) -> None:
    """Adds the partial sums of all tiles, band by band of rows."""

    def partial(part: Sides, config: Config) -> tuple[Tensor, Tensor]:
        num_rows, num_cols = part.student.shape
        row_parts = new_parts(part.factors, PLANES, num_cols, config.block_n, num_rows)
        col_parts = new_parts(part.factors, PLANES, num_rows, config.block_m, num_cols)
        tiles = row_parts.shape[1] * col_parts.shape[1]
        far = part.factors.new_empty(tiles, dtype=torch.int32)
        distill_fwd_kernel(part, row_parts, col_parts, far, kl, config)
        distill_far_kernel(part, row_parts, col_parts, far, kl, config)
        return row_parts, col_parts

    def attempt(part: Inputs, config: Config) -> None:
        partial(sides.rows(slice(0, part.shape[0])), sides.fitting(config))

    config = sides.fitting(choose("distill_fwd", sides.student, attempt))
    for band in bands(sides.student, config, PLANES):
        row_parts, col_parts = partial(sides.rows(band), config)
        distill_merge_kernel(row_parts, row_state[:, band], kl)
        distill_merge_kernel(col_parts, col_state, kl)
