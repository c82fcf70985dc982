"""Powers of two that the forward pass leaves for the backward pass, which then saves a product.

A power is 2^(logit - shift) of a pair that has no rule of its own, rounded like the derivative that
is made of it. It is good for rows and columns whose log-sum-exps are not far below its shift. Tiles
where that does not hold, or that hold positives or masked pairs, are formed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.launch import Inputs
from m3bind_kernels.stats_side import by_sides
from m3bind_kernels.tiles import tile_at
from m3bind_kernels.waves import is_precise

BLOCK = 64  # rows and columns of one shift; all tiles are made of them
_BLOCK = tl.constexpr(BLOCK)
PIECE = 32  # columns at a time, so that two programs fit a multiprocessor's registers


@dataclass(frozen=True, slots=True)
class Kept:
    """Of the first rows of a matrix, or of a band of its rows."""

    powers: Tensor  # [rows, whole blocks of columns] float16 or float32
    shifts: Tensor  # [blocks of rows, blocks of columns] float32; inf where nothing is kept

    @staticmethod
    def of(inputs: Inputs, memory: Tensor) -> Kept | None:
        """Made of that memory, where it is any and saves time: of few features a product takes
        less than the way to the memory and back, and few pairs do not average rounding out."""
        half = inputs.x.dtype != torch.float32
        if inputs.totals or by_sides(inputs) or (half and is_precise(inputs)):
            return None
        rows = memory.shape[0] * BLOCK // (BLOCK + 1)
        if rows == 0:
            return None
        across = triton.cdiv(inputs.y.shape[0], BLOCK)
        powers = memory[:rows].view(torch.float16 if half else torch.float32)
        return Kept(powers, memory[rows:, :across])

    def rows(self, band: slice) -> Kept | None:
        """Of a band that begins with a block; it may reach beyond what is kept."""
        if band.start >= self.powers.shape[0]:
            return None
        last = triton.cdiv(band.stop, BLOCK)
        return Kept(self.powers[band], self.shifts[band.start // BLOCK : last])

    def arguments(self) -> tuple[Tensor, Tensor, int, int, int]:
        return (
            self.powers, self.shifts, self.powers.shape[0], self.powers.stride(0),
            self.shifts.stride(0),
        )  # fmt: skip


NOTHING = (None, None, 0, 0, 0)  # as `Kept.arguments`


def memory_for(inputs: Inputs, rows: int) -> Tensor:
    """For what is kept of so many rows, [rows + blocks of rows, words] float32."""
    words = triton.cdiv(inputs.y.shape[0], BLOCK) * BLOCK * inputs.x.itemsize // 4
    return inputs.x.new_empty((rows + triton.cdiv(rows, BLOCK), words), dtype=torch.float32)


@triton.jit
def above_one(powers):
    """What powers up to 1 are multiplied by, so that float16 holds more of the small ones."""
    return 32768.0 if powers.dtype.element_ty == tl.float16 else 1.0


@triton.jit
def _reach(powers):
    """How far log-sum-exps may lie below a shift: what a power loses then, 2^-25 of float16's
    or 2^-126, is less than its rounding."""
    return 5.0 if powers.dtype.element_ty == tl.float16 else 64.0


@triton.jit
def keep_shifts(
    shifts, shift, row_tile, col_tile, kept_rows, num_cols, shifts_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the shift of a tile, inf where it is not kept."""
    rows = row_tile * (BLOCK_M // _BLOCK) + tl.arange(0, BLOCK_M // _BLOCK)
    cols = col_tile * (BLOCK_N // _BLOCK) + tl.arange(0, BLOCK_N // _BLOCK)
    inside = (rows * _BLOCK < kept_rows)[:, None] & (cols * _BLOCK < num_cols)[None, :]
    at = shifts + rows.to(tl.int64)[:, None] * shifts_stride + cols[None, :]
    tl.store(at, tl.zeros([BLOCK_M // _BLOCK, BLOCK_N // _BLOCK], tl.float32) + shift, mask=inside)


@triton.jit
def highest_shift(
    shifts, row_tile, col_tile, kept_rows, num_cols, shifts_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a tile's blocks; inf where some of it is not kept."""
    rows = row_tile * (BLOCK_M // _BLOCK) + tl.arange(0, BLOCK_M // _BLOCK)
    cols = col_tile * (BLOCK_N // _BLOCK) + tl.arange(0, BLOCK_N // _BLOCK)
    inside = (rows * _BLOCK < kept_rows)[:, None] & (cols * _BLOCK < num_cols)[None, :]
    at = shifts + rows.to(tl.int64)[:, None] * shifts_stride + cols[None, :]
    return tl.max(tl.max(tl.load(at, mask=inside, other=float("inf")), 1), 0)


@triton.jit
def is_kept(
    powers, shifts, row_shift_ranges, col_shift_ranges, row_tile, col_tile, kept_rows, num_cols,
    shifts_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether the powers of a tile serve its rows and columns."""
    highest = highest_shift(
        shifts, row_tile, col_tile, kept_rows, num_cols, shifts_stride, BLOCK_M, BLOCK_N
    )
    row_low = tl.load(row_shift_ranges + 2 * row_tile)
    col_low = tl.load(col_shift_ranges + 2 * col_tile)
    return highest - tl.minimum(row_low, col_low) <= _reach(powers)


@triton.jit
def _kept_bwd_kernel(
    factor,  # [1] float32: logits in base 2 are factor * dot
    row_shift_ranges, col_shift_ranges,  # [tiles, 2] float32
    row_vectors, col_vectors,  # [4, N], [4, M] float32: see `Upstream`
    powers, shifts, kept_rows, powers_stride, shifts_stride,
    out, scale_parts, row_lost, col_lost,  # as of stats_bwd's kernel
    num_rows, num_cols, row_stride, col_stride, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,  # of a block's columns
):  # fmt: skip
    row_tile, col_tile = tile_at(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N), 8
    )
    if is_kept(
        powers, shifts, row_shift_ranges, col_shift_ranges, row_tile, col_tile, kept_rows,
        num_cols, shifts_stride, BLOCK_M, BLOCK_N,
    ):  # fmt: skip
        # Such a tile is whole: nothing has to be masked.
        LEAST: tl.constexpr = 5.9e-8 if powers.dtype.element_ty == tl.float16 else 1.2e-38
        base2 = tl.load(factor)
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        shift = highest_shift(
            shifts, row_tile, col_tile, kept_rows, num_cols, shifts_stride, BLOCK_M, BLOCK_N
        )
        row_at = row_vectors + rows
        by_row = tl.load(row_at + row_stride) * tl.exp2(shift - tl.load(row_at))
        shift_at = shifts + (rows // _BLOCK).to(tl.int64) * shifts_stride
        from_row = rows.to(tl.int64)[:, None]
        by_scale = tl.zeros([BLOCK_M], tl.float32)
        lost = tl.zeros([BLOCK_M], tl.float32)
        first_at = powers + from_row * powers_stride
        first_at += col_tile * BLOCK_N + tl.arange(0, PIECE)[None, :]
        coming = tl.load(first_at, eviction_policy="evict_first")
        for p in range(BLOCK_N // PIECE):
            power = coming.to(tl.float32)
            if p + 1 < BLOCK_N // PIECE:  # on its way while this piece is worked on
                coming = tl.load(first_at + (p + 1) * PIECE, eviction_policy="evict_first")
            first = col_tile * BLOCK_N + p * PIECE
            cols = first + tl.arange(0, PIECE)
            col_at = col_vectors + cols
            by_col = tl.load(col_at + col_stride) * tl.exp2(shift - tl.load(col_at))
            own_shift = tl.load(shift_at + first // _BLOCK)
            # 0 has no logarithm, and what stands for it is multiplied by 0.
            logits = tl.log2(tl.maximum(power, LEAST)) + own_shift[:, None]
            power *= tl.exp2(own_shift - shift)[:, None]
            grad = power * (by_row[:, None] + by_col[None, :])
            by_scale += tl.sum(grad * logits, 1)
            rounded = grad.to(out.dtype.element_ty)
            if row_lost is not None:
                left = grad - rounded.to(tl.float32)
                lost += tl.sum(left, 1)
                at = col_lost + row_tile.to(tl.int64) * num_cols + cols
                tl.store(at, tl.sum(left, 0))
            tl.store(out + from_row * out_stride + cols[None, :], rounded)
        tl.store(scale_parts + tl.program_id(0), tl.sum(by_scale, 0) / base2)
        if row_lost is not None:
            tl.store(row_lost + col_tile.to(tl.int64) * num_rows + rows, lost)


def kept_bwd_kernel(
    kept: Kept, factor: Tensor, ranges: list[Tensor], row_vectors: Tensor, col_vectors: Tensor,
    out: Tensor, scale_parts: Tensor, lost: tuple[Tensor | None, Tensor | None], config: Config,
) -> None:  # fmt: skip
    """What `stats_bwd_kernel` fills, in the tiles that are kept."""
    num_rows, num_cols = out.shape
    tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(num_cols, config.block_n)
    _kept_bwd_kernel[(tiles,)](
        factor, *ranges, row_vectors, col_vectors, *kept.arguments(), out, scale_parts, *lost,
        num_rows, num_cols, row_vectors.stride(0), col_vectors.stride(0), out.stride(0),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PIECE=PIECE,
        num_warps=8,
    )  # fmt: skip
