"""Adds the partial sums of tiles up, in float64 and in the order of the tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.hopper import rows_of_block
from m3bind_kernels.launch import Inputs

# Partial sums of one band of rows, which is what the memory beyond the features is spent on.
PART_BYTES = 64 << 20
BLOCK_PARTS, BLOCK_ENTRIES = 16, 64


def new_parts(like: Tensor, planes: int, across: int, block: int, count: int) -> Tensor:
    """Memory for partial sums of `count` rows or columns, one a tile across: [planes, tiles, L]."""
    return like.new_empty((planes, triton.cdiv(across, block), count), dtype=torch.float32)


def bands(inputs: Inputs, config: Config, planes: int) -> list[slice]:
    """Rows whose partial sums fit PART_BYTES; whole tiles, and at least one."""
    num_rows, num_cols = inputs.shape
    a_row = 4 * planes * num_cols * (1 / config.block_m + 1 / config.block_n)
    block = rows_of_block(config)
    step = max(1, int(PART_BYTES / a_row) // block) * block
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


@triton.jit
def _merge_kernel(
    parts,  # [2 + SUMS, num_parts, num_entries] float32: shifts, sums, plain sums
    state,  # [2 + SUMS, state_stride] float64: the same of what came before
    num_parts, num_entries, plane, state_stride,  # plane: of `parts`, num_parts * num_entries
    SUMS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    entries = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    inside = entries < num_entries
    shift = tl.load(state + entries, mask=inside, other=0.0)
    total = tl.load(state + state_stride + entries, mask=inside, other=0.0)
    for first in range(0, num_parts, BLOCK_PARTS):
        at = first + tl.arange(0, BLOCK_PARTS)
        mask = (at < num_parts)[:, None] & inside[None, :]
        pointers = parts + at.to(tl.int64)[:, None] * num_entries + entries[None, :]
        shifts = tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float64)
        sums = tl.load(pointers + plane, mask=mask, other=0.0).to(tl.float64)
        highest = tl.maximum(shift, tl.max(shifts, 0))
        # Nothing yet: -inf less -inf would be NaN.
        base = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp2(shift - base) + tl.sum(sums * tl.exp2(shifts - base[None, :]), 0)
        shift = highest
    tl.store(state + entries, shift, mask=inside)
    tl.store(state + state_stride + entries, total, mask=inside)
    for extra in tl.static_range(SUMS):
        plain = tl.load(state + (2 + extra) * state_stride + entries, mask=inside, other=0.0)
        for first in range(0, num_parts, BLOCK_PARTS):
            at = first + tl.arange(0, BLOCK_PARTS)
            mask = (at < num_parts)[:, None] & inside[None, :]
            pointers = parts + at.to(tl.int64)[:, None] * num_entries + entries[None, :]
            found = tl.load(pointers + (2 + extra) * plane, mask=mask, other=0.0)
            plain += tl.sum(found.to(tl.float64), 0)
        tl.store(state + (2 + extra) * state_stride + entries, plain, mask=inside)


def empty_state(like: Tensor, num_sums: int, count: int) -> Tensor:
    """What `merge_kernel` adds to: nothing yet."""
    state = like.new_zeros((2 + num_sums, count), dtype=torch.float64)
    state[0] = -torch.inf
    return state


def merge_kernel(parts: Tensor, state: Tensor) -> None:
    """Adds parts [2 + sums, P, L] to a state [2 + sums, L] (of any row stride), in place."""
    sums, num_parts, num_entries = parts.shape[0] - 2, parts.shape[1], parts.shape[2]
    _merge_kernel[(triton.cdiv(num_entries, BLOCK_ENTRIES),)](
        parts, state, num_parts, num_entries, parts.stride(0), state.stride(0),
        SUMS=sums, BLOCK_PARTS=BLOCK_PARTS, BLOCK_ENTRIES=BLOCK_ENTRIES, num_warps=4,
    )  # fmt: skip
