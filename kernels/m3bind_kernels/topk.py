"""similarity_topk: collects candidates beside the tiles' products, and sorts the few that are left.

A program goes over a part of the gallery in ascending order for one block of queries. What lies
above its query's limit is written behind the query's candidates; when these become many, the k best
are kept, and the k-th is the new limit. It is exact whatever comes: a limit is never too high, and
before the space could overflow it is tidied up. Equal scores come in ascending order of columns, so
that one that is not above the limit is never wanted. A candidate is one int64 key, greater where
the score is, or where it is equal and the column lower: the order depends on no tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels import hopper
from m3bind_kernels.configs import Config, multiprocessors
from m3bind_kernels.launch import Inputs, start
from m3bind_kernels.search import choose_search, ordered, search_inputs
from m3bind_kernels.tiles import dot_products, is_special, pair_rules, pieces_of
from m3bind_kernels.topk_keep import NO_KEY, keep_best

# Candidates of one band of queries.
SPACE_BYTES = 256 << 20
# What it costs to begin a part of the gallery, where everything is above the limit, in tiles.
TILES_TO_BEGIN = 8


@triton.jit
def _topk_kernel(
    x, y,  # pointers [N, D], [M, D]
    row_mask, col_mask,  # [N], [M] int32: pairs of equal numbers are not found
    row_mask_ranges, col_mask_ranges,  # [tiles, 2]
    keys,  # [tiles_n * BLOCK_M, num_parts, CAPACITY] int64
    counts,  # [tiles_n * BLOCK_M, num_parts] int32: scratch
    limits,  # the same, float32
    num_rows, num_cols, num_features, k, num_parts, tiles_a_part, many,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, CAPACITY: tl.constexpr, HAS_MASKS: tl.constexpr,
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
    tl.assume(num_features > 0)
    # Programs that run at the same time read the same part of the gallery.
    tiles_n = tl.cdiv(num_rows, BLOCK_M)
    row_tile = tl.program_id(0) % tiles_n
    part = tl.program_id(0) // tiles_n
    last = tl.minimum((part + 1) * tiles_a_part, tl.cdiv(num_cols, BLOCK_N))
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lists = rows.to(tl.int64) * num_parts + part
    own_keys = keys + lists * CAPACITY
    count = tl.zeros([BLOCK_M], tl.int32)
    limit = tl.full([BLOCK_M], float("nan"), tl.float32)  # everything is above NaN
    for col_tile in tl.range(part * tiles_a_part, last):
        dots = dot_products(
            x_tiles, y_tiles, row_tile * BLOCK_M, col_tile * BLOCK_N, num_rows, num_cols,
            num_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
        special = is_special(
            None, None, row_mask_ranges, col_mask_ranges, row_tile, col_tile,
            num_rows, num_cols, BLOCK_M, BLOCK_N, False, HAS_MASKS,
        )  # fmt: skip
        pieces = pieces_of(dots, BLOCK_M, BLOCK_N, PIECE)
        for p in tl.static_range(BLOCK_N // PIECE):
            scores = pieces[p]
            cols = col_tile * BLOCK_N + p * PIECE + tl.arange(0, PIECE)
            above = (scores <= limit[:, None]) == 0
            if special:
                left_out, _, _, _ = pair_rules(
                    None, None, row_mask, col_mask, rows, cols, num_rows, num_cols,
                    False, HAS_MASKS,
                )  # fmt: skip
                above = above & (left_out == 0)
            found = tl.sum(above.to(tl.int32), 1)
            if tl.max(found, 0) > 0:
                places = count[:, None] + tl.cumsum(above.to(tl.int32), 1) - 1
                columns = 0xFFFFFFFF - cols.to(tl.int64)
                new = (ordered(scores).to(tl.int64) << 32) | columns[None, :]
                tl.store(own_keys[:, None] + places, new, mask=above)
                count += found
        if tl.max(count, 0) > many:
            tl.store(counts + lists, count)
            tl.debug_barrier()
            keep_best(
                keys, counts, limits, row_tile * BLOCK_M, num_parts, part, k, BLOCK_M, CAPACITY
            )
            tl.debug_barrier()
            count = tl.load(counts + lists)
            limit = tl.load(limits + lists)
    for first in range(0, CAPACITY, PIECE):
        places = first + tl.arange(0, PIECE)
        nothing = tl.full([BLOCK_M, PIECE], NO_KEY, tl.int64)
        empty = places[None, :] >= count[:, None]
        tl.store(own_keys[:, None] + places[None, :], nothing, mask=empty)


def capacity(k: int, config: Config) -> int:
    """Candidates for which a query has space: k, some more, and those of a tile."""
    return triton.next_power_of_2(k + max(k // 2, 32) + config.block_n)


def num_parts_for(tiles_n: int, tiles_m: int, programs: int, most: int) -> int:
    """In how many parts the gallery gives the least work to the busiest multiprocessor."""

    def work(parts: int) -> int:
        rounds = triton.cdiv(tiles_n * parts, programs)
        return rounds * (triton.cdiv(tiles_m, parts) + TILES_TO_BEGIN)

    return min(range(1, max(1, min(tiles_m, most)) + 1), key=work)


def topk_kernel(inputs: Inputs, k: int, config: Config) -> Tensor:
    """Candidates [N, L] of a band of queries, as keys; the k best are among them."""
    num_rows, num_cols = inputs.shape
    block_rows = hopper.rows_of_block(config)
    tiles_n, tiles_m = triton.cdiv(num_rows, block_rows), triton.cdiv(num_cols, config.block_n)
    programs = multiprocessors(inputs.x.device) * config.programs
    space = capacity(k, config)
    # What fits, and in any case one part for every program.
    most = max(programs // tiles_n, SPACE_BYTES // (8 * space * block_rows * tiles_n))
    tiles_a_part = triton.cdiv(tiles_m, num_parts_for(tiles_n, tiles_m, programs, most))
    num_parts = triton.cdiv(tiles_m, tiles_a_part)
    lists = (tiles_n * block_rows, num_parts)
    keys = inputs.x.new_empty((*lists, space), dtype=torch.int64)
    many = min(space - config.block_n, k + max(k, 32))
    if config == hopper.TILE:
        hopper.topk(inputs, keys, tiles_a_part, k, many)
        return keys[:num_rows].flatten(1)
    start(
        _topk_kernel, config, tiles_n * num_parts,
        inputs.x, inputs.y, inputs.row_mask, inputs.col_mask, *inputs.ranges(config)[2:],
        keys, keys.new_empty(lists, dtype=torch.int32), keys.new_empty(lists, dtype=torch.float32),
        num_rows, num_cols, inputs.x.shape[1], k, num_parts, tiles_a_part,
        many,
        CAPACITY=space, **inputs.constants(config),
    )  # fmt: skip
    return keys[:num_rows].flatten(1)


def similarity_topk_fwd(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    k: int,
    query_ids: Tensor | None,  # [N] int64
    gallery_ids: Tensor | None,  # [M] int64
    native: bool = False,
) -> tuple[Tensor, Tensor]:  # [N, k] float32, [N, k] int64
    """The k best rows of the gallery for each query; see `m3bind.ops.topk`."""
    inputs = search_inputs(queries, gallery, query_ids, gallery_ids, native)
    num_rows, num_cols = inputs.shape
    best = inputs.x.new_full((num_rows, k), NO_KEY.value, dtype=torch.int64)
    if num_rows > 0 and num_cols > 0:
        with torch.cuda.device_of(inputs.x):
            config = hopper.TILE
            if not inputs.native or k < 1 or capacity(k, config) > hopper.MOST_CANDIDATES:
                config = choose_search(inputs, lambda part, config: topk_kernel(part, k, config))
            step = max(1, SPACE_BYTES // (8 * capacity(k, config)) // config.block_m)
            for first in range(0, num_rows, step * config.block_m):
                band = slice(first, first + step * config.block_m)
                best[band] = topk_kernel(inputs.rows(band), k, config).topk(k).values
    return _decoded(best)


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and columns of keys; -inf and -1 where there is none."""
    nothing = keys == NO_KEY.value
    order = (keys >> 32).int()
    # The key of NaN is one of the bit patterns of NaN.
    scores = torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
    columns = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    return scores.masked_fill(nothing, -torch.inf), columns.masked_fill(nothing, -1)
