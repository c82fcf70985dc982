"""similarity_stats: all that a contrastive loss needs of the similarity matrix, in one pass.

With `s = logit_scale * (x @ y.T - margin * positive)`, for every row (and every column alike)::

    0: log-sum-exp of the logits that enter it
    1: sum of the logits of the positives
    2: sum of all logits that are not masked (0 unless `totals`)

`positive` are the pairs of equal class. A class is `4 * number + 2 * one_row + one_column`: the
only positive of a row stays out of its log-sum-exp, since `softplus(lse_of_negatives - positive)`
is exact where `lse_of_all - positive` cancels. Pairs with equal mask that are not positive are
masked: they enter nothing. `Pairs` makes the classes and masks out of what users pass.
"""

from typing import Any

import torch
from torch import Tensor

from m3bind.dtypes import accumulation_dtype, statistics_dtype
from m3bind.ops.define import define, differentiate
from m3bind.ops.pairs import Pairs

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
    backend: str,
) -> tuple[Tensor, Tensor]:  # [3, N], [3, M]
    return torch.ops.m3bind.similarity_stats_fwd(
        x, y, logit_scale, pairs.row_class, pairs.col_class, pairs.row_mask, pairs.col_mask,
        margin, totals, backend,
    )  # fmt: skip


def _fwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    stats = statistics_dtype(x.device)
    return x.new_empty(3, x.shape[0], dtype=stats), y.new_empty(3, y.shape[0], dtype=stats)


def _bwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_y = rest[-2:]
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1])),
        x.new_empty((), dtype=accumulation_dtype(x.dtype)),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.margin, ctx.totals, ctx.backend = inputs
    rows, cols = output
    ctx.save_for_backward(*tensors, rows, cols)


def _backward(ctx: Any, grad_rows: Tensor, grad_cols: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, rows, cols = ctx.saved_tensors
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    grad_x, grad_y, grad_scale = torch.ops.m3bind.similarity_stats_bwd(
        *tensors, ctx.margin, ctx.totals, rows[0], cols[0], grad_rows, grad_cols,
        need_x, need_y, ctx.backend,
    )  # fmt: skip
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        grad_scale if need_scale else None,
        *(None,) * 7,
    )


define(
    "similarity_stats",
    "similarity_stats_fwd",
    _INPUTS + ") -> (Tensor rows, Tensor cols)",
    _fwd_fake,
)
define(
    "similarity_stats",
    "similarity_stats_bwd",
    _INPUTS + ", Tensor row_lse, Tensor col_lse, Tensor grad_rows, Tensor grad_cols, bool need_x,"
    " bool need_y) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    _bwd_fake,
)
differentiate("similarity_stats", _save, _backward)
