"""similarity_rank: counts what is found before each query's positives, in one pass of the tiles.

First the positives' own scores, from tiles of listed pairs: the same products in the same order
over the features as in the tiles that they are then compared with, so that they should have the
same bits (they have in the interpreter; it has not yet run on a GPU). Then every
tile adds its counts, as integers, so that the order of the additions does not matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.launch import INTERPRETED, Inputs, launch
from m3bind_kernels.search import choose_search, ordered, search_inputs
from m3bind_kernels.tiles import dot_products, is_special, listed_products, pair_rules, tile_at

# Of one launch, which counts its tiles in 32 bits.
MOST_TILES = 1 << 30


@triton.jit
def _rank_own_kernel(
    x, y,  # pointers [N, D], [M, D]
    labels,  # [N, P] int32
    own,  # [N, P] int32: scores as `ordered` has them; of labels below 0 anything
    num_pairs, num_features, num_slots,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Pairs lie on the diagonal of a tile; the rest of it is not wanted.
    PAIRS: tl.constexpr = min(BLOCK_M, BLOCK_N)
    for block in range(tl.program_id(0), tl.cdiv(num_pairs, PAIRS), tl.num_programs(0)):
        left = block * PAIRS + tl.arange(0, BLOCK_M)
        right = tl.minimum(block * PAIRS + tl.arange(0, BLOCK_N), num_pairs - 1)
        rows = (tl.minimum(left, num_pairs - 1) // num_slots).to(tl.int64)
        cols = tl.maximum(tl.load(labels + right), 0).to(tl.int64)
        dots = listed_products(
            x, y, rows, cols, num_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INTERPRETED
        )
        diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_N)[None, :]
        mine = ordered(tl.sum(tl.where(diagonal, dots, 0.0), 1))
        tl.store(own + left, mine, mask=(tl.arange(0, BLOCK_M) < PAIRS) & (left < num_pairs))


@triton.jit
def _rank_kernel(
    x, y,  # pointers [N, D], [M, D]
    row_mask, col_mask,  # [N], [M] int32: pairs of equal numbers take no place
    row_mask_ranges, col_mask_ranges,  # [tiles, 2]
    labels, own,  # [N, P] int32
    better,  # [N, P] int32: how many come before; added to
    num_rows, num_cols, num_features, num_slots,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, HAS_MASKS: tl.constexpr, FLATTEN: tl.constexpr,
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
    tl.assume(num_features > 0)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_m, tl.num_programs(0), flatten=FLATTEN):
        row_tile, col_tile = tile_at(tile, tiles_n, tiles_m, 8)
        dots = dot_products(
            x_tiles, y_tiles, row_tile * BLOCK_M, col_tile * BLOCK_N, num_rows, num_cols,
            num_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        scores = ordered(dots)
        if is_special(
            None, None, row_mask_ranges, col_mask_ranges, row_tile, col_tile,
            num_rows, num_cols, BLOCK_M, BLOCK_N, False, HAS_MASKS,
        ):  # fmt: skip
            left_out, _, _, _ = pair_rules(
                None, None, row_mask, col_mask, rows, cols, num_rows, num_cols, False, HAS_MASKS
            )
            scores = tl.where(left_out, -2147483648, scores)
        at = rows.to(tl.int64) * num_slots
        for slot in range(num_slots):
            mine = tl.load(own + at + slot, mask=rows < num_rows, other=0)
            label = tl.load(labels + at + slot, mask=rows < num_rows, other=0)
            # Before its own column an equal score comes first.
            least = mine[:, None] - (cols[None, :] < label[:, None]).to(tl.int32)
            count = tl.sum((scores > least).to(tl.int32), 1)
            tl.atomic_add(better + at + slot, count, (rows < num_rows) & (count > 0), sem="relaxed")


def _own_kernel(inputs: Inputs, labels: Tensor, own: Tensor, config: Config) -> None:
    """Fills the scores of the listed pairs."""
    num_pairs, features = labels.numel(), inputs.x.shape[1]
    launch(
        _rank_own_kernel, config, num_pairs, 1,
        inputs.x, inputs.y, labels, own, num_pairs, features, labels.shape[1],
        EVEN_K=features % config.block_k == 0, DESCRIPTORS=False, INTERPRETED=INTERPRETED,
    )  # fmt: skip


def rank_kernel(
    inputs: Inputs, labels: Tensor, own: Tensor, better: Tensor, config: Config
) -> None:
    """Adds how many rows of the gallery come before each listed one."""
    launch(
        _rank_kernel, config, *inputs.shape,
        inputs.x, inputs.y, inputs.row_mask, inputs.col_mask, *inputs.ranges(config)[2:],
        labels, own, better, *inputs.shape, inputs.x.shape[1], labels.shape[1],
        # Several slots are a second loop within that over the tiles.
        FLATTEN=labels.shape[1] == 1, **inputs.constants(config),
    )  # fmt: skip


def similarity_rank_fwd(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    labels: Tensor,  # [N, P] int64
    query_ids: Tensor | None,  # [N] int64
    gallery_ids: Tensor | None,  # [M] int64
) -> Tensor:  # [N, P] int64
    """Ranks from 1 of the rows of the gallery that `labels` names; see `m3bind.ops.rank`."""
    inputs = search_inputs(queries, gallery, query_ids, gallery_ids)
    if labels.numel() == 0 or gallery.shape[0] == 0:
        return torch.zeros_like(labels)
    wanted = labels.clamp(min=-1)
    known = wanted >= 0
    if query_ids is not None and gallery_ids is not None:
        known &= query_ids[:, None] != gallery_ids[wanted.clamp(min=0)]

    def attempt(part: Inputs, config: Config, first: int = 0) -> Tensor:
        slots = wanted[first : first + part.shape[0]].int().contiguous()
        own, better = torch.empty_like(slots), torch.zeros_like(slots)
        _own_kernel(part, slots, own, config)
        rank_kernel(part, slots, own, better, config)
        return better

    with torch.cuda.device_of(inputs.x):
        config = choose_search(inputs, attempt)
        tiles_m = triton.cdiv(gallery.shape[0], config.block_n)
        step = max(1, MOST_TILES // tiles_m) * config.block_m
        bands = [slice(i, min(i + step, len(labels))) for i in range(0, len(labels), step)]
        better = torch.cat([attempt(inputs.rows(b), config, b.start) for b in bands])
    return (better.long() + 1).where(known, 0)
