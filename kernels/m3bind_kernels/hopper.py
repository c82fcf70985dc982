"""Tiles by the kernels of csrc/cuda (m3bind._C_cuda), where they fit: 16-bit features in rows of
whole 16 bytes, on a processor of compute capability 9.0. All else is as with Triton's tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m3bind_kernels.configs import Config

if TYPE_CHECKING:
    from m3bind_kernels.kept import Kept
    from m3bind_kernels.launch import Inputs

# What a warpgroup leaves behind. Triton's kernels that go over the same tiles run with it, too.
TILE = Config(64, 256, 64, 8, 3)
BLOCK_ROWS = 128  # two warpgroups
MOST_CANDIDATES = 1024  # of a query in similarity_topk


def rows_of_block(config: Config) -> int:
    """Rows that one program takes together."""
    return BLOCK_ROWS if config == TILE else config.block_m


def runs_on(device: torch.device) -> bool:
    """Whether the kernels are built for this processor; the CPU is that of the emulator."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) == (9, 0)


def stats_fwd(
    part: Inputs, row_parts: Tensor, col_parts: Tensor, far: Tensor, kept: Kept | None
) -> None:
    """`stats_fwd_kernel` with `TILE`; `far` must be zeros."""
    places: tuple[Tensor | None, ...] = (None,) * 4
    if kept is not None:
        places = kept.powers, kept.shifts, kept.row_sums, kept.col_sums
    torch.ops.m3bind_hopper.stats_fwd(
        part.x, part.y, part.factor, *part.numbers(), *part.ranges(TILE), part.margin, part.totals,
        row_parts, col_parts, far, *places,
    )  # fmt: skip


def topk(part: Inputs, keys: Tensor, tiles_a_part: int, k: int, many: int) -> None:
    """Fills `keys` [rows, parts, space], whole blocks of rows, as `_topk_kernel` does."""
    torch.ops.m3bind_hopper.topk(
        part.x, part.y, part.row_mask, part.col_mask, *part.ranges(TILE)[2:], keys, tiles_a_part,
        k, many,
    )  # fmt: skip


def siglip(
    part: Inputs, logits: Tensor, losses: Tensor | None, weights: Tensor | None,
    boost: Tensor | None, wanted: Tensor | None, out: Tensor | None, lone: Tensor | None,
    sums: Tensor | None,
) -> None:  # fmt: skip
    """`siglip_kernel` with `TILE`, for derivatives in float16."""
    torch.ops.m3bind_hopper.siglip(
        part.x, part.y, logits, *part.numbers(), *part.ranges(TILE), losses, weights, boost, wanted,
        out, lone, sums,
    )  # fmt: skip


def stats_bwd(
    part: Inputs, ranges: list[Tensor], row_vectors: Tensor, col_vectors: Tensor, apart: bool,
    out: Tensor, scale_parts: Tensor, row_lost: Tensor, col_lost: Tensor,
) -> None:  # fmt: skip
    """`stats_bwd_kernel` with `TILE`, for derivatives in float16."""
    torch.ops.m3bind_hopper.stats_bwd(
        part.x, part.y, part.factor, *part.numbers(), *part.ranges(TILE), part.margin, part.totals,
        apart, *ranges, row_vectors, col_vectors, out, scale_parts, row_lost, col_lost,
    )  # fmt: skip
