"""From the statistics of the rows (or of the columns) to the loss of each of them, in O(N)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# softplus(t) is t to the last bit of a float64 above this; torch's default of 20 is not.
SOFTPLUS_LINEAR = 50.0


@dataclass(kw_only=True, slots=True)
class Side:
    """What `m3bind.ops.stats` found of the rows, or of the columns."""

    lse: Tensor  # [L], without the only positive
    target: Tensor  # [L], sum of the positives' logits; of soft targets their mean
    total: Tensor  # [L], sum of all logits in the denominator
    positives: Tensor | None  # [L] int64; None: soft targets
    unmasked: Tensor | int  # [L], how many logits that are
    valid: Tensor | None = None  # [L] bool, where targets are soft


def add_exponentials(a: Tensor, b: Tensor) -> Tensor:
    """torch.logaddexp, but of nothing and nothing, -inf, with gradients of 0 instead of NaN."""
    nothing = (a == -torch.inf) & (b == -torch.inf)
    some = torch.logaddexp(a.masked_fill(nothing, 0), b.masked_fill(nothing, 0))
    return some.masked_fill(nothing, -torch.inf)


def direction_loss(
    side: Side,
    bias: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [L], [L] bool
    """The loss of every row, 0 where it has no target, and which rows have one."""
    lse, target, valid = side.lse, side.target, side.valid
    if side.positives is None:
        assert valid is not None
        lse = lse.where(valid, 0)  # -inf of a row without any column would give NaN gradients
        loss = lse - target
    else:
        valid = side.positives > 0
        single = side.positives == 1
        # Unlike LSE - positive this does not cancel: a nearly separated batch keeps its gradient.
        alone = F.softplus(lse - target, threshold=SOFTPLUS_LINEAR)
        lse = lse.where(valid, 0)
        loss = alone.where(single, lse - target / side.positives.clamp(min=1))
        if label_smoothing or z_loss:
            lse = torch.logaddexp(lse, target).where(single, lse)
    if label_smoothing:
        total = side.total.where(valid, 0)  # that of no columns, 0 / 0, would give NaN gradients
        spread = lse - total / side.unmasked
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    if z_loss:
        loss = loss + z_loss * (lse if bias is None else lse + bias) ** 2
    if bias is not None:
        loss = loss + 0 * bias  # a gradient of 0, and NaN in gives NaN out
    return loss.where(valid, 0).to(dtype), valid
