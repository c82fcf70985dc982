"""Forward mode: how what an operator gives moves with its inputs, by its own backward pass.

A row's result is a function of its logits, `s * x_i . y_j + b`. With Z_ij its derivatives by them,
it moves along (dx, dy, ds, db) by::

    s * (dx_i . sum_j Z_ij y_j + x_i . sum_j Z_ij dy_j)
    + ds * x_i . sum_j Z_ij y_j + db * sum_j Z_ij

The gradient of x is `s * sum_j Z_ij y_j`, for whatever features y has: with [x, 0, 0] and
[y, dy, 1] the logits are what they were, and all sums come out of one backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind.dtypes import accumulation_dtype

Moves = tuple[Tensor | None, ...]  # of each input, None where it stays


def in_sums(features: Tensor) -> Tensor:
    """In the dtype of sums: tangents are not rounded to 16 bit on their way."""
    return features.to(accumulation_dtype(features.dtype))


def with_moves(*given: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """Features and their moves, one after the other; 0 where they stay."""
    found = []
    for value, move in given:
        value = in_sums(value)
        found += [value, torch.zeros_like(value) if move is None else in_sums(move)]
    return tuple(found)


def of_rows(
    x: Tensor,  # [N, D]
    dx: Tensor,
    y: Tensor,  # [M, D]
    dy: Tensor,
    scale: Tensor,  # []
    dscale: Tensor | None,
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
    dbias: Tensor | None = None,
) -> Tensor:  # [..., N]
    """Moves of the rows' results; `gradient(x, y, scale)` is x's [..., N, D] for upstream 1."""
    width = x.shape[1]
    # Instead of 0, a scale that divides, and that no logit shows.
    divisor = scale.where(scale.abs() > 2.0**-60, 2.0**-60)
    wide_x, wide_y = F.pad(x, (0, width + 1)), F.pad(torch.cat([y, dy], 1), (0, 1), value=1.0)
    by_y, by_dy, by_one = gradient(wide_x, wide_y, divisor).split([width, width, 1], -1)
    moved = (scale / divisor) * ((dx * by_y).sum(-1) + (x * by_dy).sum(-1))
    if dscale is not None:
        moved = moved + (dscale / divisor) * (x * by_y).sum(-1)
    if dbias is not None:
        moved = moved + (dbias / divisor) * by_one.squeeze(-1)
    return moved


def of_both(
    x: Tensor,
    dx: Tensor,
    y: Tensor,
    dy: Tensor,
    scale: Tensor,
    dscale: Tensor | None,
    gradients: Callable[[Tensor, Tensor, Tensor, bool], Tensor],
) -> tuple[Tensor, Tensor]:  # [..., N], [..., M]
    """Moves of the rows' and of the columns' results; `gradients(x, y, scale, of_x)` is that of x
    for the rows' upstream 1 or, not `of_x`, that of y for the columns'."""
    rows = of_rows(x, dx, y, dy, scale, dscale, lambda x, y, scale: gradients(x, y, scale, True))
    cols = of_rows(y, dy, x, dx, scale, dscale, lambda y, x, scale: gradients(x, y, scale, False))
    return rows, cols


def of_total(grads: tuple[Tensor, ...], moves: Moves) -> Tensor:  # []
    """The move of one number, of its gradients."""
    total: Any = 0
    for grad, move in zip(grads, moves, strict=True):
        if move is not None:
            total = total + (grad * move).sum()
    return total
