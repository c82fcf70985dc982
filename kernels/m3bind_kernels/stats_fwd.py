"""similarity_stats, forward: row and column statistics of the similarity matrix in one pass.

A persistent kernel goes over the tiles; each writes sums of 2^(logit - shift) of its rows and of
its columns, and the merge kernel adds them up. Shifts are integers in base 2, so that bringing sums
to a common shift is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels import hopper
from m3bind_kernels.configs import Config
from m3bind_kernels.kept import NOTHING, Kept, above_one, memory_for
from m3bind_kernels.launch import Inputs, launch
from m3bind_kernels.merge import bands, empty_state, merge_kernel, new_parts
from m3bind_kernels.stats_far import stats_far_kernel
from m3bind_kernels.tiles import (
    dot_products,
    finite_shift,
    is_special,
    pair_rules,
    pieces_of,
    tile_at,
)
from m3bind_kernels.tuning import choose


@triton.jit
def _stats_fwd_kernel(
    x, y,  # pointers [N, D], [M, D]
    factor,  # [1] float32: logits in base 2 are factor * (dot - margin * positive)
    row_class, col_class, row_mask, col_mask,  # [N] or [M] int32
    row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,  # [tiles, 2]
    row_parts, col_parts,  # [PLANES, tiles_m, N], [PLANES, tiles_n, M] float32
    far,  # [tiles] int32: where the sums are not good
    powers, shifts, kept_row_sums, kept_col_sums, kept_rows, powers_stride, sums_stride,  # `Kept`
    row_sums_plane, col_sums_plane,
    num_rows, num_cols, num_features, row_plane, col_plane, margin,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, HAS_CLASSES: tl.constexpr, HAS_MASKS: tl.constexpr, TOTALS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
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
        row_at = row_parts + col_tile.to(tl.int64) * num_rows + rows
        col_first = col_parts + row_tile.to(tl.int64) * num_cols
        special = is_special(
            row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges,
            row_tile, col_tile, num_rows, num_cols, BLOCK_M, BLOCK_N, HAS_CLASSES, HAS_MASKS,
        )  # fmt: skip
        # One shift for the tile, of the dot products, since logits kept for later would fill the
        # registers. A negative margin raises positives above what is there.
        if base2 < 0:
            highest = tl.min(tl.min(dots, 1), 0) * base2
        else:
            highest = tl.max(tl.max(dots, 1), 0) * base2
        raised = tl.where(special, tl.maximum(-margin * base2, 0.0), 0.0)
        shift = finite_shift(highest + raised)
        if powers is not None:
            keep = ((row_tile + 1) * BLOCK_M <= kept_rows) & (special == 0)
            above = above_one(powers)
            if row_tile * BLOCK_M < kept_rows:
                at = shifts + row_tile.to(tl.int64) * tiles_m + col_tile
                tl.store(at, tl.where(keep, shift - tl.log2(above), float("inf")))
        pieces = pieces_of(dots, BLOCK_M, BLOCK_N, PIECE)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        row_positives = tl.zeros([BLOCK_M], tl.float32)
        row_total = tl.zeros([BLOCK_M], tl.float32)
        row_dots = tl.zeros([BLOCK_M], tl.float32)
        least = tl.full([PIECE], 1.0, tl.float32)
        for p in tl.static_range(BLOCK_N // PIECE):
            part = pieces[p]
            cols = col_tile * BLOCK_N + p * PIECE + tl.arange(0, PIECE)
            col_at = col_first + cols
            col_positives = tl.zeros([PIECE], tl.float32)
            if special:
                left_out, positive, not_in_row, not_in_col = pair_rules(
                    row_class, col_class, row_mask, col_mask, rows, cols, num_rows, num_cols,
                    HAS_CLASSES, HAS_MASKS,
                )  # fmt: skip
                if HAS_CLASSES:
                    part = tl.where(positive, part - margin, part)
                    wanted = tl.where(positive, part, 0.0)
                    row_positives += tl.sum(wanted, 1)
                    col_positives = tl.sum(wanted, 0)
                power = tl.where(left_out, 0.0, tl.exp2(part * base2 - shift))
                if HAS_CLASSES:
                    row_sum += tl.sum(tl.where(not_in_row, 0.0, power), 1)
                    col_sum = tl.sum(tl.where(not_in_col, 0.0, power), 0)
                else:
                    row_sum += tl.sum(power, 1)
                    col_sum = tl.sum(power, 0)
                if TOTALS:
                    part = tl.where(left_out, 0.0, part)
            else:
                power = tl.exp2(part * base2 - shift)
                row_sum += tl.sum(power, 1)
                col_sum = tl.sum(power, 0)
                if powers is not None and keep:
                    row_dots += tl.sum(power * part, 1)
                    at = powers + rows.to(tl.int64)[:, None] * powers_stride + cols[None, :]
                    kept = (power * above).to(powers.dtype.element_ty)
                    tl.store(at, kept, eviction_policy="evict_first")
                    at = kept_col_sums + row_tile.to(tl.int64) * num_cols + cols
                    tl.store(at, col_sum * above)
                    tl.store(at + col_sums_plane, tl.sum(power * part, 0) * above)
            least = tl.minimum(least, tl.where(cols < num_cols, col_sum, 1.0))
            tl.store(col_at, tl.zeros([PIECE], tl.float32) + shift, mask=cols < num_cols)
            tl.store(col_at + col_plane, col_sum, mask=cols < num_cols)
            if HAS_CLASSES:
                tl.store(col_at + 2 * col_plane, col_positives, mask=cols < num_cols)
            if TOTALS:
                row_total += tl.sum(part, 1)
                total_at = col_at + (2 + HAS_CLASSES) * col_plane
                tl.store(total_at, tl.sum(part, 0), mask=cols < num_cols)
        smallest = tl.minimum(tl.min(tl.where(rows < num_rows, row_sum, 1.0), 0), tl.min(least, 0))
        # What is lost to underflow (at 2^-126) is below the rounding of sums above 2^-64. Rows or
        # columns far below the others, or left out, or a NaN: stats_far.
        tl.store(far + tile, ((smallest >= 5.4e-20) == 0).to(tl.int32))
        row_shift = tl.zeros([BLOCK_M], tl.float32) + shift
        tl.store(row_at, row_shift, mask=rows < num_rows)
        tl.store(row_at + row_plane, row_sum, mask=rows < num_rows)
        if powers is not None and keep:
            at = kept_row_sums + col_tile.to(tl.int64) * sums_stride + rows
            tl.store(at, row_sum * above)
            tl.store(at + row_sums_plane, row_dots * above)
        if HAS_CLASSES:
            tl.store(row_at + 2 * row_plane, row_positives, mask=rows < num_rows)
        if TOTALS:
            total_at = row_at + (2 + HAS_CLASSES) * row_plane
            tl.store(total_at, row_total, mask=rows < num_rows)


def stats_fwd_kernel(
    part: Inputs, row_parts: Tensor, col_parts: Tensor, far: Tensor, kept: Kept | None,
    config: Config,
) -> None:  # fmt: skip
    """Fills the partial statistics [planes, tiles, N or M] of a band of rows. The sums of powers
    are not good in tiles that `far` [tiles], zeros before, then names. Fills what is kept, too."""
    if config == hopper.TILE:
        hopper.stats_fwd(part, row_parts, col_parts, far, kept)
        return
    launch(
        _stats_fwd_kernel, config, *part.shape,
        part.x, part.y, part.factor, *part.numbers(), *part.ranges(config),
        row_parts, col_parts, far, *(NOTHING if kept is None else kept.arguments()),
        *part.shape, part.x.shape[1],
        row_parts.stride(0), col_parts.stride(0), part.margin,
        HAS_CLASSES=part.row_class is not None, TOTALS=part.totals, **part.constants(config),
    )  # fmt: skip


def similarity_stats_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    row_class: Tensor | None,  # [N] int32
    col_class: Tensor | None,  # [M] int32
    row_mask: Tensor | None,  # [N] int32
    col_mask: Tensor | None,  # [M] int32
    margin: float,
    totals: bool,
    kept_rows: int,
    native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # [3, N], [3, M] float64, memory of `Kept`
    """Of every row and column: log-sum-exp of its logits, sum of the positives', sum of all.

    What enters which is told by `m3bind.ops.stats`.
    """
    inputs = Inputs.of(
        x, y, logit_scale, row_class, col_class, row_mask, col_mask, margin, totals, native
    )
    num_rows, num_cols = inputs.shape
    num_sums = int(row_class is not None) + int(totals)
    memory = memory_for(inputs, kept_rows)
    states = [empty_state(inputs.x, num_sums, count) for count in inputs.shape]
    if num_rows > 0 and num_cols > 0:
        with torch.cuda.device_of(inputs.x):
            _fill(inputs, num_sums, Kept.of(inputs, memory), *states)
    rows, cols = (_statistics(state, inputs) for state in states)
    return rows, cols, memory


def _fill(
    inputs: Inputs, num_sums: int, kept: Kept | None, row_state: Tensor, col_state: Tensor
) -> None:
    """Adds the partial statistics of all tiles, band by band of rows."""

    def partial(part: Inputs, config: Config, kept: Kept | None = None) -> tuple[Tensor, Tensor]:
        num_rows, num_cols = part.shape
        row_parts = new_parts(part.x, 2 + num_sums, num_cols, config.block_n, num_rows)
        col_parts = new_parts(part.x, 2 + num_sums, num_rows, config.block_m, num_cols)
        tiles = row_parts.shape[1] * col_parts.shape[1]
        far = part.x.new_zeros(tiles, dtype=torch.int32)
        stats_fwd_kernel(part, row_parts, col_parts, far, kept, config)
        stats_far_kernel(part, row_parts, col_parts, far, config)
        return row_parts, col_parts

    if kept is not None:
        config = kept.config
    else:
        config = hopper.TILE if inputs.native else choose("stats_fwd", inputs, partial)
    for band in bands(inputs, config, 2 + num_sums):
        of_band = None if kept is None else kept.rows(band)
        row_parts, col_parts = partial(inputs.rows(band), config, of_band)
        merge_kernel(row_parts, row_state[:, band])
        merge_kernel(col_parts, col_state)


def _statistics(state: Tensor, inputs: Inputs) -> Tensor:
    """The merged sums [2 + sums, L] as statistics [3, L], in natural logarithms."""
    stats = state.new_zeros((3, state.shape[1]))
    stats[0] = (state[1].log2() + state[0]) * inputs.nats()
    plain = list(state[2:])
    if inputs.row_class is not None:
        stats[1] = plain.pop(0) * inputs.scale
    if inputs.totals:
        stats[2] = plain.pop(0) * inputs.scale
    return stats
