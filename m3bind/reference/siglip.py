"""The pairwise sigmoid loss as it is defined, on the whole matrix of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind.dtypes import accumulation_dtype
from m3bind.reference.clip import Ids, targets_of
from m3bind.reference.lse import logits_of


def siglip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor | None = None,  # []
    *,
    labels: Tensor | None = None,  # [N] int64
    positive_ids: Ids | None = None,
    mask_ids: Ids | None = None,
    reduction: str = "mean",
) -> Tensor:
    logits = logits_of(x, y, logit_scale)
    if logit_bias is not None:
        logits = logits + logit_bias.to(accumulation_dtype(x.dtype))
    positive = targets_of(x, y, labels, positive_ids, None)
    losses = -F.logsigmoid(torch.where(positive, logits, -logits))
    if mask_ids is not None:
        masked = (mask_ids[0][:, None] == mask_ids[1][None, :]) & ~positive
        losses = losses.masked_fill(masked, 0)
    if reduction == "none":
        return losses.sum(1)
    return losses.sum() / (x.shape[0] if reduction == "mean" else 1)
