"""Powers of two that the forward pass leaves for the backward pass, which then saves a product.

A power is 2^(logit - shift) of a pair that has no rule of its own, rounded like the derivative that
is made of it. What rounding takes from sums of rows and columns is known, since the sums are left,
too; and so are sums of power * dot, of which the scale's gradient is made. Tiles that hold
positives or masked pairs, or that reach beyond the matrix, are not kept, and those whose powers are
too small for some row or column are formed again.

Both passes go over the same tiles: backend, processor, dtype and number of features say which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels import hopper
from m3bind_kernels.configs import Config, fitting, for_device
from m3bind_kernels.launch import Inputs
from m3bind_kernels.stats_side import by_sides
from m3bind_kernels.tiles import tile_at
from m3bind_kernels.waves import is_precise

BLOCK = 64  # tiles are made of whole ones; memory is reckoned by them
PAIRS = 2048  # at a time, so that two programs fit a multiprocessor's registers


def memory_for(inputs: Inputs, rows: int) -> Tensor:
    """For what is kept of so many rows, [words] float32; see `kept_shape` in m3bind.ops.stats."""
    down, across = triton.cdiv(rows, BLOCK), triton.cdiv(inputs.y.shape[0], BLOCK)
    row_words = BLOCK * inputs.x.itemsize // 4 + 2
    words = across * (rows * row_words + down * (2 * BLOCK + 1))
    return inputs.x.new_empty(words, dtype=torch.float32)


def rows_in(memory: Tensor, inputs: Inputs) -> int:
    """The inverse."""
    across = triton.cdiv(inputs.y.shape[0], BLOCK)
    row_words = BLOCK * inputs.x.itemsize // 4 + 2
    words = memory.numel() // across if across else 0
    blocks, rest = divmod(words, BLOCK * row_words + 2 * BLOCK + 1)
    return blocks * BLOCK + (rest - 2 * BLOCK - 1) // row_words if rest else blocks * BLOCK


def kept_config(inputs: Inputs) -> Config:
    if inputs.native:
        return hopper.TILE
    half = inputs.x.dtype != torch.float32
    found = for_device("stats_fwd", half, inputs.x.device)
    return fitting(found, inputs.x.shape[1])[0]


@dataclass(frozen=True, slots=True)
class Kept:
    """Of the first rows of a matrix, or of a band of its rows."""

    powers: Tensor  # [rows, whole blocks of columns] float16 or float32
    shifts: Tensor  # [tiles of rows, tiles of columns] float32; inf where nothing is kept
    row_sums: Tensor  # [2, tiles of columns, rows] float32: of powers before rounding, power * dot
    col_sums: Tensor  # [2, tiles of rows, columns] float32
    config: Config
    reach: float  # how far log-sum-exps may lie below a shift

    @staticmethod
    def of(inputs: Inputs, memory: Tensor) -> Kept | None:
        """Made of that memory, where it is any and saves time: of few features a product takes
        less than the way to the memory and back, and few pairs do not average rounding out."""
        half = inputs.x.dtype != torch.float32
        rows, (num_rows, num_cols) = rows_in(memory, inputs), inputs.shape
        if rows == 0 or inputs.totals or by_sides(inputs) or (half and is_precise(inputs)):
            return None
        config = kept_config(inputs)
        assert config.block_m % BLOCK == config.block_n % BLOCK == 0
        down, across = triton.cdiv(rows, config.block_m), triton.cdiv(num_cols, config.block_n)
        width = triton.cdiv(num_cols, BLOCK) * BLOCK
        sizes = (rows * width * inputs.x.itemsize // 4, 2 * across * rows, 2 * down * num_cols)
        powers, row_sums, col_sums, rest = memory.contiguous().split(
            [*sizes, memory.numel() - sum(sizes)]
        )
        # A power of 2^-25 is lost, or 2^-126. Where a row's softmax is spread over all columns
        # that is 2^-11 of it, and less everywhere else.
        reach = 14.0 - math.ceil(math.log2(max(num_rows, num_cols))) if half else 64.0
        return Kept(
            powers=powers.view(torch.float16 if half else torch.float32).view(rows, width),
            shifts=rest[: down * across].view(down, across),
            row_sums=row_sums.view(2, across, rows), col_sums=col_sums.view(2, down, num_cols),
            config=config, reach=reach,
        )  # fmt: skip

    def rows(self, band: slice) -> Kept | None:
        """Of a band that begins with a tile; it may reach beyond what is kept."""
        if band.start >= self.powers.shape[0]:
            return None
        block = self.config.block_m
        tiles = slice(band.start // block, triton.cdiv(band.stop, block))
        return Kept(
            self.powers[band], self.shifts[tiles], self.row_sums[..., band],
            self.col_sums[:, tiles], self.config, self.reach,
        )  # fmt: skip

    def arguments(self) -> tuple[Tensor | int, ...]:
        return (
            self.powers, self.shifts, self.row_sums, self.col_sums, self.powers.shape[0],
            self.powers.stride(0), self.row_sums.stride(1), self.row_sums.stride(0),
            self.col_sums.stride(0),
        )  # fmt: skip


NOTHING = (None, None, None, None, 0, 0, 0, 0, 0)  # as `Kept.arguments`


@triton.jit
def above_one(powers):
    """What powers up to 1 are multiplied by, so that float16 holds more of the small ones."""
    return 32768.0 if powers.dtype.element_ty == tl.float16 else 1.0


@triton.jit
def _kept_bwd_kernel(
    row_shift_ranges, col_shift_ranges,  # [tiles, 2] float32
    row_vectors, col_vectors,  # [4, N], [4, M] float32: see `Upstream`
    powers, shifts, row_sums, col_sums, kept_rows, powers_stride, sums_stride,
    row_sums_plane, col_sums_plane,
    out, scale_parts, row_lost, col_lost,  # as of stats_bwd's kernel
    left, left_count,  # [tiles], [1] int32: those that must be formed again, in any order
    num_rows, num_cols, row_stride, col_stride, out_stride, reach,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # at a time
):  # fmt: skip
    tile, tiles_m = tl.program_id(0), tl.cdiv(num_cols, BLOCK_N)
    row_tile, col_tile = tile_at(tile, tl.cdiv(num_rows, BLOCK_M), tiles_m, 8)
    inside = row_tile * BLOCK_M < kept_rows
    at = shifts + row_tile.to(tl.int64) * tiles_m + col_tile
    shift = tl.load(at, mask=inside, other=float("inf"))
    row_low = tl.load(row_shift_ranges + 2 * row_tile)
    col_low = tl.load(col_shift_ranges + 2 * col_tile)
    if shift - tl.minimum(row_low, col_low) <= reach:
        # Such a tile is whole: nothing has to be masked.
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        by_col = tl.load(col_vectors + col_stride + cols)
        by_col *= tl.exp2(shift - tl.load(col_vectors + cols))
        col_sums_at = col_sums + row_tile.to(tl.int64) * num_cols + cols
        col_sum = tl.load(col_sums_at)
        all_rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        by_all_rows = tl.load(row_vectors + row_stride + all_rows)
        by_all_rows *= tl.exp2(shift - tl.load(row_vectors + all_rows))
        sums_at = row_sums + col_tile.to(tl.int64) * sums_stride
        row_sum = tl.load(sums_at + all_rows)
        # A mean of the dot products, so that little cancels, and sums of derivatives.
        powers_sum = tl.maximum(tl.sum(row_sum, 0), 1.2e-38)
        row_dots = tl.load(sums_at + row_sums_plane + all_rows)
        col_dots = tl.load(col_sums_at + col_sums_plane)
        level = tl.sum(row_dots, 0) / powers_sum
        of_rows = tl.sum(by_all_rows * row_sum, 0)
        of_cols = tl.sum(by_col * col_sum, 0)
        by_dots = tl.sum(by_all_rows * (row_dots - level * row_sum), 0)
        by_dots += tl.sum(by_col * (col_dots - level * col_sum), 0)
        tl.store(scale_parts + tile, by_dots + level * (of_rows + of_cols))
        # What a row's sum loses of the columns' softmaxes is reckoned with a mean of them.
        off_col = by_col + of_rows / powers_sum
        mean_by_col = of_cols / powers_sum
        lost = tl.zeros([ROWS, BLOCK_N], tl.float32)
        first = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, ROWS)
        powers_at = powers + first[:, None] * powers_stride + cols[None, :]
        out_at = out + first[:, None] * out_stride + cols[None, :]
        coming = tl.load(powers_at, eviction_policy="evict_first")
        for p in range(BLOCK_M // ROWS):
            power = coming.to(tl.float32)
            powers_at += ROWS * powers_stride.to(tl.int64)
            if p + 1 < BLOCK_M // ROWS:  # on its way while these rows are worked on
                coming = tl.load(powers_at, eviction_policy="evict_first")
            rows = row_tile * BLOCK_M + p * ROWS + tl.arange(0, ROWS)
            by_row = tl.load(row_vectors + row_stride + rows)
            by_row *= tl.exp2(shift - tl.load(row_vectors + rows))
            grad = power * (by_row[:, None] + by_col[None, :])
            rounded = grad.to(out.dtype.element_ty)
            if row_lost is not None:
                rest = grad - rounded.to(tl.float32)
                lost += rest - power * off_col[None, :]
                off_row = by_row + mean_by_col
                found = tl.sum(rest - power * off_row[:, None], 1)
                found += tl.load(sums_at + rows) * off_row
                tl.store(row_lost + col_tile.to(tl.int64) * num_rows + rows, found)
            tl.store(out_at, rounded)
            out_at += ROWS * out_stride.to(tl.int64)
        if row_lost is not None:
            found = tl.sum(lost, 0) + col_sum * off_col
            tl.store(col_lost + row_tile.to(tl.int64) * num_cols + cols, found)
    else:
        tl.store(left + tl.atomic_add(left_count, 1), tile)


def kept_bwd_kernel(
    kept: Kept, ranges: list[Tensor], row_vectors: Tensor, col_vectors: Tensor,
    out: Tensor, scale_parts: Tensor, lost: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `stats_bwd_kernel` fills, in the tiles that are kept; the list of the others [tiles],
    and how many there are [1] int32."""
    num_rows, num_cols = out.shape
    config, tiles = kept.config, scale_parts.shape[0]
    left, left_count = (scale_parts.new_zeros(n, dtype=torch.int32) for n in (tiles, 1))
    _kept_bwd_kernel[(tiles,)](
        *ranges, row_vectors, col_vectors, *kept.arguments(), out, scale_parts, *lost,
        left, left_count, num_rows, num_cols, row_vectors.stride(0), col_vectors.stride(0),
        out.stride(0), kept.reach, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        ROWS=PAIRS // config.block_n, num_warps=8,
    )  # fmt: skip
    return left, left_count
