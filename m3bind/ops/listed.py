"""listed_dots: dot products of each row with the few columns that it lists, and their gradient."""

from typing import Any

import torch
from torch import Tensor

from m3bind import chunked
from m3bind.ops.define import define_plain, differentiate
from m3bind.ops.tangents import Moves, with_moves

GRADIENT = (
    "(Tensor x, Tensor y, Tensor columns, Tensor grad, bool need_x, bool need_y)"
    " -> (Tensor grad_x, Tensor grad_y)"
)


def listed_dots(x: Tensor, y: Tensor, columns: Tensor) -> Tensor:  # [N, K]
    """`(x[:, None] * y[columns]).sum(2)`, without the [N, K, D] of its gradient; columns >= 0."""
    if columns.shape[1] == 0 or y.shape[0] == 0:
        return x.new_zeros(columns.shape)
    return torch.ops.m3bind.listed_dots_fwd(x, y, columns)


def _fwd(x: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    return torch.stack([(x * y[at]).sum(1) for at in columns.unbind(1)], 1)


def _fwd_fake(x: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty(columns.shape)


def gradient_fake(
    x: Tensor, y: Tensor, columns: Tensor, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1])),
    )


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_y, _ = ctx.needs_input_grad
    grad_x, grad_y = torch.ops.m3bind.listed_dots_bwd(*ctx.saved_tensors, grad, need_x, need_y)
    return grad_x if need_x else None, grad_y if need_y else None, None


def moved_dots(
    x: Tensor, y: Tensor, columns: Tensor, dx: Tensor | None, dy: Tensor | None
) -> Tensor:
    """How they move with x and y."""
    x, dx, y, dy = with_moves((x, dx), (y, dy))
    return listed_dots(dx, y, columns) + listed_dots(x, dy, columns)


def _tangents(inputs: tuple[Tensor, ...], moves: Moves, _: Any) -> tuple[Tensor]:
    return (moved_dots(*inputs, *moves[:2]),)


define_plain("listed_dots_fwd", "(Tensor x, Tensor y, Tensor columns) -> Tensor", _fwd, _fwd_fake)
# What similarity_topk's gradient is, too.
define_plain("listed_dots_bwd", GRADIENT, chunked.similarity_topk_bwd, gradient_fake)
differentiate("listed_dots", _save, _backward, _tangents)
