"""info_nce_rows: one direction of the plain CLIP loss, x looks for y, with three matrix products.

A row's normaliser needs its own logits only, so the gradient of a sum over rows is known as soon as
its row is: the forward pass forms it, and the backward pass multiplies it by what comes from above.
The columns' direction is the same with x and y exchanged.
"""

from typing import Any

import torch
from torch import Tensor

from m3bind.dtypes import accumulation_dtype
from m3bind.ops.arguments import gradient_wanted
from m3bind.ops.define import define, define_plain, differentiate
from m3bind.ops.tangents import Moves, in_sums, of_total


def info_nce_rows(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D], M >= N
    logit_scale: Tensor,  # []
    *,
    margin: float,
    mean: bool,
    backend: str,
) -> Tensor:  # []
    loss, *_ = torch.ops.m3bind.info_nce_rows_fwd(
        x, y, logit_scale, margin, mean, gradient_wanted(x), gradient_wanted(y), backend
    )
    return loss


def _fwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, need_x, need_y, _ = rest
    acc = accumulation_dtype(x.dtype)
    return (
        x.new_empty((), dtype=acc),
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1]), dtype=acc),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1]), dtype=acc),
        x.new_empty((), dtype=acc),
    )


def _bwd(
    grad: Tensor,  # []
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    grad_x: Tensor,
    grad_y: Tensor,
    grad_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in every backend; only the product is rounded to 16 bit, as in siglip_total."""
    return (grad_x * grad).to(x.dtype), (grad_y * grad).to(y.dtype), grad_scale * grad


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    # The inputs go along so that a double backward meets the refusal of info_nce_rows_bwd.
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grads = torch.ops.m3bind.info_nce_rows_bwd(grad, *ctx.saved_tensors)
    need = ctx.needs_input_grad[:3]
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *(None,) * 5)


def _tangents(inputs: tuple[Any, ...], moves: Moves, _: Any) -> tuple[Tensor]:
    x, y, scale, margin, mean, _, _, backend = inputs
    x, y = in_sums(x), in_sums(y)
    need = (moves[0] is not None, moves[1] is not None)
    loss, *grads = torch.ops.m3bind.info_nce_rows_fwd(x, y, scale, margin, mean, *need, backend)
    grads = torch.ops.m3bind.info_nce_rows_bwd(torch.ones_like(loss), x, y, scale, *grads)
    return (of_total(grads, moves[:3]),)


define(
    "similarity_stats",
    "info_nce_rows_fwd",
    "(Tensor x, Tensor y, Tensor logit_scale, float margin, bool mean, bool need_x, bool need_y)"
    " -> (Tensor loss, Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    _fwd_fake,
)
define_plain(
    "info_nce_rows_bwd",
    "(Tensor grad, Tensor x, Tensor y, Tensor logit_scale, Tensor grad_x, Tensor grad_y,"
    " Tensor grad_scale) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd,
)
differentiate("info_nce_rows", _save, _backward, _tangents)
