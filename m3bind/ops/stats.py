"""similarity_stats: all that a contrastive loss needs of the similarity matrix, in one pass.

With `s = logit_scale * (x @ y.T - margin * positive)`, for every row (and every column alike)::

    0: log-sum-exp of the logits that enter it
    1: sum of the logits of the positives
    2: sum of all logits that are not masked (0 unless `totals`)

`positive` are the pairs of equal class. A class is `4 * number + 2 * one_row + one_column`: the
only positive of a row stays out of its log-sum-exp, since `softplus(lse_of_negatives - positive)`
is exact where `lse_of_all - positive` cancels. Pairs with equal mask that are not positive are
masked: they enter nothing. `Pairs` makes the classes and masks out of what users pass.

What the backward pass needs of the first `kept_rows` rows stays in memory, and it forms the others
again: dot products, so that both passes see the same bits; or, in backends for GPUs, where memory
is slow beside products, powers of 2 as wide as the features.
"""

import math
from typing import Any

import torch
from torch import Tensor

from m3bind import backends
from m3bind.dtypes import accumulation_dtype, statistics_dtype
from m3bind.ops.define import define, differentiate
from m3bind.ops.pairs import Pairs

MEMORY_BUDGET = 64.0  # MiB, of dot products
BLOCK = 64  # rows and columns of what is kept
# Up to so many the kernels for GPUs do without, see Kept.of in m3bind_kernels.
FEW_FEATURES, FEW_PAIRS = 256, 1 << 20
_INPUTS = (
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_class, Tensor? col_class,"
    " Tensor? row_mask, Tensor? col_mask, float margin, bool totals"
)


def similarity_stats(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    pairs: Pairs,
    *,
    margin: float = 0.0,
    totals: bool = False,
    kept_rows: int = 0,
    backend: str,
) -> tuple[Tensor, Tensor]:  # [3, N], [3, M]
    rows, cols, _ = torch.ops.m3bind.similarity_stats_fwd(
        x, y, logit_scale, pairs.row_class, pairs.col_class, pairs.row_mask, pairs.col_mask,
        margin, totals, kept_rows, backend,
    )  # fmt: skip
    return rows, cols


def rows_to_keep(
    x: Tensor, num_cols: int, memory_budget: float | None, totals: bool, backend: str
) -> int:
    """How many rows `memory_budget` MiB hold: all, or whole blocks of 64."""
    powers, num_rows = backends.keeps_powers("similarity_stats", backend), x.shape[0]
    if memory_budget is None:
        memory_budget = 0.0 if powers else MEMORY_BUDGET
    few = x.shape[1] <= FEW_FEATURES or (x.itemsize == 2 and num_rows * num_cols <= FEW_PAIRS)
    if powers and (totals or few):
        return 0
    words = math.prod(kept_shape(x, BLOCK, num_cols, backend))  # of a block of rows
    block_bytes = accumulation_dtype(x.dtype).itemsize * max(1, words)
    fitting = memory_budget * 2**20 / block_bytes * BLOCK
    return num_rows if fitting >= num_rows else int(fitting) // BLOCK * BLOCK


def kept_shape(x: Tensor, kept_rows: int, num_cols: int, backend: str) -> tuple[int, ...]:
    """Of the tensor that keeps them, in the dtype of sums. For powers it is memory that
    m3bind_kernels.kept divides: powers, two sums a row and column of each tile, shifts."""
    if not backends.keeps_powers("similarity_stats", backend):
        return kept_rows, num_cols
    down, across = ((size + BLOCK - 1) // BLOCK for size in (kept_rows, num_cols))
    row_words = BLOCK * x.itemsize // 4 + 2
    return (across * (kept_rows * row_words + down * (2 * BLOCK + 1)),)


def fwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats, acc = statistics_dtype(x.device), accumulation_dtype(x.dtype)
    *_, kept_rows, backend = rest
    return (
        x.new_empty(3, x.shape[0], dtype=stats),
        y.new_empty(3, y.shape[0], dtype=stats),
        x.new_empty(kept_shape(x, kept_rows, y.shape[0], backend), dtype=acc),
    )


def bwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_x, need_y, _ = rest
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1])),
        x.new_empty((), dtype=accumulation_dtype(x.dtype)),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.margin, ctx.totals, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[2])


def _backward(
    ctx: Any, grad_rows: Tensor, grad_cols: Tensor, unused: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, rows, cols, kept = ctx.saved_tensors
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    grad_x, grad_y, grad_scale = torch.ops.m3bind.similarity_stats_bwd(
        *tensors, ctx.margin, ctx.totals, rows[0], cols[0], kept, grad_rows, grad_cols,
        need_x, need_y, ctx.backend,
    )  # fmt: skip
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        grad_scale if need_scale else None,
        *(None,) * 8,
    )


define(
    "similarity_stats",
    "similarity_stats_fwd",
    _INPUTS + ", SymInt kept_rows) -> (Tensor rows, Tensor cols, Tensor kept)",
    fwd_fake,
)
define(
    "similarity_stats",
    "similarity_stats_bwd",
    _INPUTS + ", Tensor row_lse, Tensor col_lse, Tensor kept, Tensor grad_rows, Tensor grad_cols,"
    " bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    bwd_fake,
)
differentiate("similarity_stats", _save, _backward)
