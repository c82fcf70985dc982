"""clip_loss: symmetric InfoNCE, the loss of CLIP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind import backends, reference
from m3bind.ops import arguments
from m3bind.reference import REDUCTIONS, accumulation_dtype, reduce_directions

# softplus(t) is t to the last bit of a float64 above this; torch's default of 20 is not.
SOFTPLUS_LINEAR = 50.0


def clip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor | float,  # [] or [1]
    *,
    logit_bias: Tensor | float | None = None,  # [] or [1]
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Symmetric InfoNCE of N pairs, without the N x N matrix of logits in memory.

    Equivalent to::

        logits = logit_scale * x @ y.T + logit_bias
        labels = torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        x, y: features, usually of unit norm; float32, bfloat16, float16 (logits are formed in
            float32) or float64. Under autocast they are cast, the scale is not.
        logit_scale: the factor itself, not its logarithm; its gradient is exact.
        logit_bias: cancels in both softmaxes: the loss does not change, its gradient is 0.
        reduction: "mean" or "sum" over the N pairs of the mean of both directions; "none" gives
            (rows [N], columns [N]). An empty batch has the mean NaN and the sum 0, as in torch.
        backend: a name from `m3bind.backends.BACKENDS`; default: the fastest that can run.

    Returns:
        float32 (float64 for float64 features). Double backward: backend="reference" only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown or unavailable backend.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision", arXiv:2103.00020.
    """
    op = "clip_loss"
    x, y = arguments.features(op, x, y)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{op}: x has {x.shape[0]} rows, y has {y.shape[0]}; row i of x belongs to row i of y"
        )
    arguments.choice(op, "reduction", reduction, REDUCTIONS)
    scale = arguments.scalar(op, "logit_scale", logit_scale, x)
    bias = None if logit_bias is None else arguments.scalar(op, "logit_bias", logit_bias, x)
    chosen = backends.resolve(op, x.device.type, x.dtype, backend)
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "reference":
            return reference.clip_loss(x, y, scale, logit_bias=bias, reduction=reduction)
        # The loss of a row is softplus(LSE of its negatives - its positive): unlike
        # LSE - positive it does not cancel, so a nearly separated batch keeps its gradient.
        # Both parts see the same widened features: 16-bit gradients are then rounded once.
        acc = accumulation_dtype(x.dtype)
        x, y = x.to(acc), y.to(acc)
        ids = torch.arange(x.shape[0], device=x.device)
        row_lse, col_lse = torch.ops.m3bind.similarity_lse_fwd(x, y, scale, ids, ids, chosen)
        positive = scale.to(row_lse.dtype) * (x * y).sum(1).to(row_lse.dtype)
        rows = F.softplus(row_lse - positive, threshold=SOFTPLUS_LINEAR).to(acc)
        cols = F.softplus(col_lse - positive, threshold=SOFTPLUS_LINEAR).to(acc)
        if bias is not None:
            rows = rows + 0 * bias  # a gradient of 0, and NaN in gives NaN out
        return reduce_directions(rows, cols, reduction)
