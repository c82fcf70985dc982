"""Row and column log-sum-exp of a similarity matrix."""

import torch
from torch import Tensor

from m3bind.dtypes import accumulation_dtype


def logits_of(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """`logit_scale * x @ y.T` in the accumulation dtype."""
    acc = accumulation_dtype(x.dtype)
    return logit_scale.to(acc) * (x.to(acc) @ y.to(acc).T)


def similarity_lse(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    row_ids: Tensor | None = None,  # [N] int64
    col_ids: Tensor | None = None,  # [M] int64
) -> tuple[Tensor, Tensor]:  # [N], [M]
    """Log-sum-exp over the columns and over the rows of `logit_scale * x @ y.T`.

    Pairs whose ids are equal are left out; a row with nothing left has -inf.
    """
    logits = logits_of(x, y, logit_scale)
    if row_ids is not None and col_ids is not None:
        logits = logits.masked_fill(row_ids[:, None] == col_ids[None, :], -torch.inf)
    return logits.logsumexp(1), logits.logsumexp(0)
