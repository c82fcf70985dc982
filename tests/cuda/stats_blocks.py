"""Inputs of similarity_stats, and its forward pass by emulated blocks."""

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch
from emulator import (
    TILE_COLS,
    TILE_ROWS,
    Sizes,
    StatsFwd,
    flags,
    library,
    numbers,
    pointer,
    shape_of_tiles,
)

LN2 = math.log(2)
# (rows, columns, features): ragged, one tile, one row and column, more stages than the ring has.
SHAPES = [(200, 600, 136), (64, 256, 64), (1, 1, 8), (300, 257, 328)]
NONE = (False, False, False)


@pytest.fixture(scope="module")
def kernels():
    return library()


def inputs(shape, dtype, given, *, scale=20.0, margin=0.0, seed=0, spread=0.0):
    """Features, who is whose positive or masked, and logits in float64. ``spread``: how much
    farther apart the lengths of features are."""
    rows, cols, features = shape
    classes, masks, _ = given
    draw = torch.Generator().manual_seed(seed)

    def normal(count):
        x = torch.nn.functional.normalize(torch.randn(count, features, generator=draw), dim=1)
        return (x * torch.exp(spread * torch.randn(count, 1, generator=draw))).to(dtype)

    def numbered(count, most):
        return torch.randint(-1, most, (count,), generator=draw).int()

    x, y = normal(rows), normal(cols)
    row_class = col_class = row_mask = col_mask = None
    positive = out = torch.zeros(rows, cols, dtype=torch.bool)
    not_in_row = not_in_col = positive
    if classes:
        row_class, col_class = numbered(rows, 40), numbered(cols, 40)
        positive = (row_class[:, None] == col_class) & (row_class[:, None] >= 0)
        not_in_row = positive & (row_class[:, None] & 1 > 0)
        not_in_col = positive & (row_class[:, None] & 2 > 0)
    if masks:
        row_mask, col_mask = numbered(rows, 30), numbered(cols, 30)
        out = (row_mask[:, None] == col_mask) & (row_mask[:, None] >= 0) & ~positive
    factor = torch.tensor([scale / LN2])
    dots = x.double() @ y.double().T
    dots = torch.where(positive, dots - margin, dots)
    return SimpleNamespace(
        x=x, y=y, dots=dots, logits=dots * factor.double() * LN2, positive=positive, out=out,
        not_in_row=out | not_in_row, not_in_col=out | not_in_col, factor=factor, margin=margin,
        sizes=Sizes(rows=rows, cols=cols, features=features), given=given,
        bf16=dtype == torch.bfloat16, shape=(rows, cols),
        numbers=numbers(row_class, col_class, row_mask, col_mask),
    )  # fmt: skip


def keeping(kept_rows: int, cols: int) -> SimpleNamespace:
    """Memory for what is kept, as `Kept` of m3bind_kernels divides it."""
    down, across = shape_of_tiles(kept_rows, cols)
    return SimpleNamespace(
        powers=torch.full((kept_rows, -(-cols // 64) * 64), math.nan, dtype=torch.float16),
        shifts=torch.full((down, across), math.nan),
        row_sums=torch.full((2, across, kept_rows), math.nan),
        col_sums=torch.full((2, down, cols), math.nan),
    )


def forward(kernels, given, *, blocks=2, seed=0, kept_rows=0):
    """Parts of rows and columns, which tiles are far, and what is kept."""
    rows, cols = given.shape
    kept = keeping(kept_rows, cols)
    tiles_n, tiles_m = shape_of_tiles(rows, cols)
    planes = 2 + given.given[0] + given.given[2]
    row_parts = torch.full((planes, tiles_m, rows), math.nan)
    col_parts = torch.full((planes, tiles_n, cols), math.nan)
    far = torch.zeros(tiles_n * tiles_m, dtype=torch.int32)
    p = StatsFwd(
        sizes=given.sizes, numbers=given.numbers, factor=given.factor, margin=given.margin,
        row_parts=row_parts, col_parts=col_parts, row_plane=row_parts.stride(0),
        col_plane=col_parts.stride(0), far=far, kept_rows=kept_rows, shifts=kept.shifts,
        kept_row_sums=kept.row_sums, kept_col_sums=kept.col_sums, kept_row_stride=kept_rows,
        kept_row_plane=kept.row_sums.stride(0), kept_col_plane=kept.col_sums.stride(0),
    )  # fmt: skip
    kernels.emulate_stats_fwd(
        ctypes.c_bool(given.bf16), flags(*given.given, kept_rows > 0), pointer(given.x),
        pointer(given.y), pointer(kept.powers), kept.powers.stride(0), ctypes.byref(p), blocks,
        ctypes.c_uint64(seed),
    )  # fmt: skip
    return row_parts, col_parts, far, kept


def order(rows: int, cols: int) -> list[tuple[int, int]]:
    """(row, column) of the tiles as they are counted: eight rows of tiles together."""
    tiles_n, tiles_m = shape_of_tiles(rows, cols)
    return [
        (row, col)
        for first in range(0, tiles_n, 8)
        for col in range(tiles_m)
        for row in range(first, min(first + 8, tiles_n))
    ]


def named(far, rows: int, cols: int) -> set[tuple[int, int]]:
    return {tile for tile, flag in zip(order(rows, cols), far, strict=True) if flag}


def block(matrix, tile: tuple[int, int]):
    row, col = tile[0] * TILE_ROWS, tile[1] * TILE_COLS
    return matrix[row : row + TILE_ROWS, col : col + TILE_COLS]
