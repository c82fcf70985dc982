"""Upstream gradients as the backward kernel wants them: scaled to the range of 16-bit numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Derivatives by the dot products stay below 2^14, so that float16 (up to 2^16) holds them, and with
# them 38 binary digits below the largest.
LARGEST_EXPONENT = 14


def factor_for(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` [] float64 just below 2^LARGEST_EXPONENT."""
    exponent = LARGEST_EXPONENT - torch.frexp(largest).exponent
    # A float64 holds it, as it does its inverse.
    factor = torch.ldexp(torch.ones_like(largest), exponent.clamp(-1000, 1000))
    return factor.where(largest > 0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """Vectors of the rows and columns, [4, N] and [4, M] float32: shift, an integer above the
    log-sum-exp in base 2; upstream gradient of the log-sum-exp times 2^(shift - log-sum-exp);
    upstream gradients of the positives' and of all logits."""

    rows: Tensor
    cols: Tensor
    factor: Tensor  # [] float64, a power of two: the gradients have been multiplied by it

    @staticmethod
    def of(
        row_lse: Tensor, col_lse: Tensor, grad_rows: Tensor, grad_cols: Tensor, nats: Tensor
    ) -> "Upstream":
        grads = [g.detach().double() for g in (grad_rows, grad_cols)]
        # No element of the derivative exceeds the sum of what can meet in it.
        largest = sum(g.abs().nan_to_num(0, 0, 0).amax(1).sum() for g in grads)
        assert isinstance(largest, Tensor)
        factor = factor_for(largest)
        rows, cols = (
            _vectors(lse.detach().double() / nats, grad * factor)
            for lse, grad in zip((row_lse, col_lse), grads, strict=True)
        )
        return Upstream(rows=rows, cols=cols, factor=factor)

    def exchanged(self) -> "Upstream":
        return Upstream(rows=self.cols, cols=self.rows, factor=self.factor)


def _vectors(lse: Tensor, grad: Tensor) -> Tensor:
    # Nothing was summed: there is no logit to which this shift matters.
    nothing = lse == -torch.inf
    shift = lse.masked_fill(nothing, 0).ceil()
    weight = (grad[0] * torch.exp2(shift - lse)).masked_fill(nothing, 0)
    return torch.stack([shift, weight, grad[1], grad[2]]).float()


def partners(own: Tensor | None, others: Tensor | None) -> Tensor | None:
    """Where the only positive of a class with both bits is among the others; -1: no such class."""
    if own is None or others is None:
        return None
    ordered, order = others.sort()
    at = torch.searchsorted(ordered, own).clamp(max=others.shape[0] - 1)
    found = (ordered[at] == own) & (own >= 0) & (own & 3 == 3)
    return order[at].where(found, -1)


def partner_derivatives(partner: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Of vectors as in `Upstream`: the derivative at the pair of each row and its partner."""
    at = partner.clamp(min=0)
    return own[2] + others[2, at] + own[3] + others[3, at]


def add_partners(grad: Tensor, partner: Tensor, derivative: Tensor, features: Tensor) -> None:
    """grad[i] += derivative[i] * features[partner[i]], in float32, where i has a partner.

    The derivative by the only positive's logit is the largest of its row; rounded to 16 bit it
    would be most of the gradient's error.
    """
    found = partner >= 0
    theirs = features[partner.clamp(min=0)].float().where(found[:, None], 0)
    grad.addcmul_(derivative.where(found, 0)[:, None], theirs)
