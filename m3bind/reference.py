"""The operators in plain PyTorch with the whole similarity matrix: the oracle of every test.

Everything here is differentiable any number of times, and exact in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and losses: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The dtype of log-sum-exps between forward and backward: float64 wherever there is one.

    At logits of 120, float32 would round them by 4e-6: an error that all softmax values of a row
    share, and that the gradient of the scale multiplies by 120.
    """
    return torch.float32 if device.type == "mps" else torch.float64


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
    acc = accumulation_dtype(x.dtype)
    logits = logit_scale.to(acc) * (x.to(acc) @ y.to(acc).T)
    if row_ids is not None and col_ids is not None:
        logits = logits.masked_fill(row_ids[:, None] == col_ids[None, :], -torch.inf)
    return logits.logsumexp(1), logits.logsumexp(0)


def clip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    *,
    logit_bias: Tensor | None = None,  # []
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Symmetric InfoNCE as everybody writes it, on logits in the accumulation dtype."""
    acc = accumulation_dtype(x.dtype)
    logits = logit_scale.to(acc) * (x.to(acc) @ y.to(acc).T)
    if logit_bias is not None:
        logits = logits + logit_bias.to(acc)
    labels = torch.arange(x.shape[0], device=x.device)
    rows = F.cross_entropy(logits, labels, reduction="none")
    cols = F.cross_entropy(logits.T, labels, reduction="none")
    return reduce_directions(rows, cols, reduction)


def reduce_directions(rows: Tensor, cols: Tensor, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    """The mean of both directions; an empty batch has the mean NaN and the sum 0, as in torch."""
    if reduction == "mean":
        return (rows.mean() + cols.mean()) / 2
    if reduction == "sum":
        return (rows.sum() + cols.sum()) / 2
    return rows, cols
