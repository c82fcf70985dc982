"""What the kernels over the similarity matrix share: tile order, dot products, pair rules."""

import triton
import triton.language as tl


@triton.jit
def tile_at(tile, tiles_n, tiles_m, GROUP: tl.constexpr):
    """(row, column) of a tile: GROUP rows of tiles together, so that L2 serves their operands."""
    group = tile // (GROUP * tiles_m)
    first = group * GROUP
    size = tl.minimum(tiles_n - first, GROUP)
    inside = tile % (GROUP * tiles_m)
    return first + inside % size, inside // size


@triton.jit
def listed_features(x, rows, k, num_features, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """Features [rows, BLOCK_K] of listed rows, int64; beyond the last feature zeros."""
    at = k + tl.arange(0, BLOCK_K)
    pointers = x + rows[:, None] * num_features + at[None, :]
    if EVEN_K:
        found = tl.load(pointers)
    else:
        found = tl.load(pointers, mask=(at < num_features)[None, :], other=0.0)
    return found


@triton.jit
def features(
    x, first_row, num_rows, k, num_features,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Features [BLOCK, BLOCK_K]; beyond the last row anything finite or that row, beyond the last
    feature zeros."""
    if DESCRIPTORS:
        found = x.load([first_row, k])
    else:
        rows = tl.minimum(first_row + tl.arange(0, BLOCK), num_rows - 1).to(tl.int64)
        found = listed_features(x, rows, k, num_features, BLOCK_K, EVEN_K)
    return found


@triton.jit
def dot_products(
    x, y, first_row, first_col, num_rows, num_cols, num_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """float32 dot products of a tile [BLOCK_M, BLOCK_N]."""
    dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, num_features, BLOCK_K):
        a = features(x, first_row, num_rows, k, num_features, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS)
        b = features(y, first_col, num_cols, k, num_features, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS)
        dots = _add_product(dots, a, b, INTERPRETED)
    return dots


@triton.jit
def listed_products(
    x, y, rows, cols, num_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The same bits as `dot_products` gives for these rows [BLOCK_M] and columns [BLOCK_N], int64,
    which may lie anywhere."""
    dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, num_features, BLOCK_K):
        a = listed_features(x, rows, k, num_features, BLOCK_K, EVEN_K)
        b = listed_features(y, cols, k, num_features, BLOCK_K, EVEN_K)
        dots = _add_product(dots, a, b, INTERPRETED)
    return dots


@triton.jit
def _add_product(dots, a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.T, dots, input_precision="ieee")


@triton.jit
def row_features(
    x, rows, num_rows, num_features, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr
):  # fmt: skip
    """All features [rows, BLOCK_D]; zeros beyond the last one, and beyond the last row."""
    at = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None]
    if not EVEN_D:
        mask = mask & (at < num_features)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * num_features + at[None, :], mask, other=0.0)


@triton.jit
def times(a, b, INTERPRETED: tl.constexpr):
    """a @ b in float32."""
    if INTERPRETED:  # see _add_product
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def pieces_of(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr):
    """The tile in pieces of PIECE columns, so that what is computed of it fits the registers."""
    if BLOCK_N == PIECE:
        pieces = (tile,)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tile.reshape([BLOCK_M, 2, HALF]).permute(0, 2, 1).split()
        pieces = pieces_of(left, BLOCK_M, HALF, PIECE) + pieces_of(right, BLOCK_M, HALF, PIECE)
    return pieces


@triton.jit
def finite_shift(highest):
    """An integer above the highest logit, so that differences of shifts are exact; 0 where there is
    no logit at all."""
    return tl.where(highest == -float("inf"), 0.0, tl.ceil(highest))


@triton.jit
def numbers(values, at, count, MISSING: tl.constexpr):
    """Classes or masks, those that equal nothing replaced by MISSING."""
    found = tl.load(values + at, mask=at < count, other=MISSING)
    return tl.where(found < 0, MISSING, found)


@triton.jit
def may_meet(row_ranges, col_ranges, row_tile, col_tile):
    """Whether any number of a row block can equal one of a column block, by their extremes."""
    row_low, row_high = tl.load(row_ranges + 2 * row_tile), tl.load(row_ranges + 2 * row_tile + 1)
    col_low, col_high = tl.load(col_ranges + 2 * col_tile), tl.load(col_ranges + 2 * col_tile + 1)
    return (row_low <= col_high) & (col_low <= row_high)


@triton.jit
def is_special(
    row_class_ranges, col_class_ranges, row_mask_ranges, col_mask_ranges, row_tile, col_tile,
    num_rows, num_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CLASSES: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """Whether a tile can hold positives or masked pairs, or reaches beyond the matrix."""
    special = ((row_tile + 1) * BLOCK_M > num_rows) | ((col_tile + 1) * BLOCK_N > num_cols)
    if HAS_CLASSES:
        special = special | may_meet(row_class_ranges, col_class_ranges, row_tile, col_tile)
    if HAS_MASKS:
        special = special | may_meet(row_mask_ranges, col_mask_ranges, row_tile, col_tile)
    return special


@triton.jit
def pair_rules(
    row_class, col_class, row_mask, col_mask, rows, cols, num_rows, num_cols,
    HAS_CLASSES: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """Of every pair: is it left out of everything, is it positive, does it then stay out of the LSE
    of its row, of its column. One comparison each, so that none of them has to be kept."""
    left_out = (rows >= num_rows)[:, None] | (cols >= num_cols)[None, :]
    if HAS_CLASSES:
        row_number = numbers(row_class, rows, num_rows, -1)
        col_number = numbers(col_class, cols, num_cols, -2)[None, :]
        positive = row_number[:, None] == col_number
        not_in_row = tl.where((row_number & 1) != 0, row_number, -1)[:, None] == col_number
        not_in_col = tl.where((row_number & 2) != 0, row_number, -1)[:, None] == col_number
    else:
        positive = left_out
        not_in_row = left_out
        not_in_col = left_out
    if HAS_MASKS:
        masked = (
            numbers(row_mask, rows, num_rows, -1)[:, None]
            == numbers(col_mask, cols, num_cols, -2)[None, :]
        )
        if HAS_CLASSES:
            masked = masked & (row_number[:, None] != col_number)
        left_out = left_out | masked
    return left_out, positive, not_in_row, not_in_col


@triton.jit
def _ranges_kernel(values, out, count, SKIP_NEGATIVE: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(values + tl.minimum(at, count - 1))
    low = here
    if SKIP_NEGATIVE:
        low = tl.where(here < 0, 2147483647, here)
    tl.store(out + 2 * block, tl.min(low, 0))
    tl.store(out + 2 * block + 1, tl.max(here, 0))
