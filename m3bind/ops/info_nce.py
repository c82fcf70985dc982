"""info_nce: the plain CLIP loss as one number, row i and column i being each other's only positive.

All that `clip_loss` makes of the statistics of rows and columns, without its features: at a batch
of 48 the dozen small operators of the general way take longer than the matrix products. A backend
may do it in one call; the others get it out of their `similarity_stats`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind.dtypes import accumulation_dtype
from m3bind.ops import pairs, stats
from m3bind.ops.define import define, differentiate
from m3bind.ops.direction import SOFTPLUS_LINEAR
from m3bind.ops.tangents import Moves, in_sums, of_total


def info_nce(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D], M >= N
    logit_scale: Tensor,  # []
    *,
    margin: float,
    mean: bool,
    kept_rows: int,
    backend: str,
) -> Tensor:  # []
    loss, *_ = torch.ops.m3bind.info_nce_fwd(x, y, logit_scale, margin, mean, kept_rows, backend)
    return loss


def _fwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    margin: float,
    mean: bool,
    kept_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [3, N], [3, M], [kept_rows, M]
    count = x.shape[0]
    classes = pairs.diagonal_classes(count, y.shape[0], x.device)
    rows, cols, kept = torch.ops.m3bind.similarity_stats_fwd(
        x, y, logit_scale, *classes, None, None, margin, False, kept_rows, backend
    )
    total = sum(
        F.softplus(side[0, :count] - side[1, :count], threshold=SOFTPLUS_LINEAR).sum()
        for side in (rows, cols)
    )
    assert isinstance(total, Tensor)
    loss = total / (2 * (count if mean else 1))
    return loss.to(accumulation_dtype(x.dtype)), rows, cols, kept


def _bwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    margin: float,
    mean: bool,
    rows: Tensor,
    cols: Tensor,
    kept: Tensor,
    grad: Tensor,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [M, D], []
    count = x.shape[0]
    grad = grad / (2 * (count if mean else 1))
    grads = []
    for side in (rows, cols):
        by_lse = grad * (side[0] - side[1]).sigmoid()
        by_lse[count:] = 0  # columns without a positive
        grads.append(torch.stack([by_lse, -by_lse, torch.zeros_like(by_lse)]))
    classes = pairs.diagonal_classes(count, y.shape[0], x.device)
    return torch.ops.m3bind.similarity_stats_bwd(
        x, y, logit_scale, *classes, None, None, margin, False, rows[0], cols[0], kept, *grads,
        need_x, need_y, backend,
    )  # fmt: skip


def _fwd_fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty((), dtype=accumulation_dtype(x.dtype)), *stats.fwd_fake(x, *rest)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.margin, ctx.mean, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, y, scale, *saved = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    grads = torch.ops.m3bind.info_nce_bwd(
        x, y, scale, ctx.margin, ctx.mean, *saved, grad, *need[:2], ctx.backend
    )
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *(None,) * 4)


def _tangents(inputs: tuple[Any, ...], moves: Moves, _: Any) -> tuple[Tensor]:
    x, y, scale, margin, mean, _, backend = inputs
    x, y = in_sums(x), in_sums(y)
    loss, *saved = torch.ops.m3bind.info_nce_fwd(x, y, scale, margin, mean, 0, backend)
    need = (moves[0] is not None, moves[1] is not None)
    grads = torch.ops.m3bind.info_nce_bwd(
        x, y, scale, margin, mean, *saved, torch.ones_like(loss), *need, backend
    )
    return (of_total(grads, moves[:3]),)


_INPUTS = "(Tensor x, Tensor y, Tensor logit_scale, float margin, bool mean"
define(
    "similarity_stats",
    "info_nce_fwd",
    _INPUTS + ", SymInt kept_rows) -> (Tensor loss, Tensor rows, Tensor cols, Tensor kept)",
    _fwd_fake,
    _fwd,
)
define(
    "similarity_stats",
    "info_nce_bwd",
    _INPUTS + ", Tensor rows, Tensor cols, Tensor kept, Tensor grad, bool need_x, bool need_y)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    stats.bwd_fake,
    _bwd,
)
differentiate("info_nce", _save, _backward, _tangents)
