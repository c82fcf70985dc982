"""Symmetric InfoNCE as it is defined, with every feature, on the whole matrix of logits."""

import torch
from torch import Tensor

from m3bind.dtypes import accumulation_dtype
from m3bind.reference.lse import logits_of

Ids = tuple[Tensor, Tensor]  # of the rows [N], of the columns [M]


def clip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    *,
    logit_bias: Tensor | None = None,  # []
    labels: Tensor | None = None,  # [N] int64
    positive_ids: Ids | None = None,
    mask_ids: Ids | None = None,
    negatives: Tensor | None = None,  # [K, D] or [N, K, D]
    soft_targets: tuple[Tensor, Tensor] | None = None,  # columns [N, K] int64, weights [N, K]
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    margin: float = 0.0,
    directions: str = "both",
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    acc = accumulation_dtype(x.dtype)
    logits = logits_of(x, y, logit_scale)
    targets = targets_of(x, y, labels, positive_ids, soft_targets).to(acc)
    positive = ~(targets <= 0)
    logits = logits - logit_scale.to(acc) * margin * positive.to(acc)
    if logit_bias is not None:
        logits = logits + logit_bias.to(acc)
    kept = torch.ones_like(positive)
    if mask_ids is not None:
        kept = (mask_ids[0][:, None] != mask_ids[1][None, :]) | positive
    losses = []
    if directions != "columns":
        row_logits, row_kept, row_targets = logits, kept, targets
        if negatives is not None:
            extra = _extra_logits(x, negatives, logit_scale)
            if logit_bias is not None:
                extra = extra + logit_bias.to(acc)
            row_logits = torch.cat([logits, extra], 1)
            row_kept = torch.cat([kept, torch.ones_like(extra, dtype=torch.bool)], 1)
            row_targets = torch.cat([targets, torch.zeros_like(extra)], 1)
        losses.append(_direction(row_logits, row_kept, row_targets, label_smoothing, z_loss))
    if directions != "rows":
        losses.append(_direction(logits.T, kept.T, targets.T, label_smoothing, z_loss))
    return reduce(losses, reduction)


def targets_of(
    x: Tensor,
    y: Tensor,
    labels: Tensor | None,
    positive_ids: Ids | None,
    soft_targets: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The weights of the targets before they are normalised, [N, M]."""
    columns = torch.arange(y.shape[0], device=x.device)
    if soft_targets is not None:
        indices, weights = soft_targets
        weights = torch.where(indices >= 0, weights, 0)
        if y.shape[0] == 0:
            indices, weights = indices[:, :0], weights[:, :0]
        empty = weights.new_zeros(x.shape[0], y.shape[0])
        return empty.scatter_add(1, indices.clamp(min=0), weights)
    if positive_ids is not None:
        return positive_ids[0][:, None] == positive_ids[1][None, :]
    if labels is None:
        labels = torch.arange(x.shape[0], device=x.device)
    return labels[:, None] == columns[None, :]


def _extra_logits(x: Tensor, negatives: Tensor, logit_scale: Tensor) -> Tensor:  # [N, K]
    if negatives.dim() == 2:
        return logits_of(x, negatives, logit_scale)
    acc = accumulation_dtype(x.dtype)
    return logit_scale.to(acc) * torch.einsum("nd,nkd->nk", x.to(acc), negatives.to(acc))


def _direction(
    logits: Tensor,  # [N, M]
    kept: Tensor,  # [N, M] bool
    targets: Tensor,  # [N, M]
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:  # [N], [N] bool
    """The loss of every row, 0 where it has no target, and which rows have one."""
    total = targets.sum(1)
    valid = ~(total <= 0)  # NaN goes on, into the loss
    even = kept.to(logits.dtype)
    even = even / even.sum(1, keepdim=True).clamp(min=1)
    wanted = targets / total.where(valid, 1)[:, None]
    wanted = (1 - label_smoothing) * wanted + label_smoothing * even
    # A row without a target may have nothing left: its log-sum-exp has no gradient to be NaN.
    lse = logits.masked_fill(~kept & valid[:, None], -torch.inf).logsumexp(1)
    lse = lse.where(valid, 0)
    loss = (wanted * (lse[:, None] - logits)).masked_fill(~kept, 0).sum(1)
    if z_loss:
        loss = loss + z_loss * lse**2
    return loss.where(valid, 0), valid


def reduce(losses: list[tuple[Tensor, Tensor]], reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    """The mean of the directions; a direction's mean is over its valid entries.

    An empty one has the mean NaN and the sum 0, as in torch.
    """
    if reduction == "none":
        first, *rest = (loss for loss, _ in losses)
        return (first, rest[0]) if rest else first
    total = sum(loss.sum() / (valid.sum() if reduction == "mean" else 1) for loss, valid in losses)
    assert isinstance(total, Tensor)
    return total / len(losses)
