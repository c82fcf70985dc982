"""siglip_loss: the pairwise sigmoid loss of SigLIP.

There is no normaliser, so the gradient of a sum over all pairs is known as soon as the logits are:
where it will be wanted, the forward pass forms it, and the backward pass multiplies it by what
comes from above (`siglip_total`, 3 GEMMs). Where every row has its own upstream gradient, with
reduction="none", the backward pass computes the logits again (`siglip`, 4 GEMMs).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from m3bind import backends, reference
from m3bind.dtypes import accumulation_dtype, statistics_dtype
from m3bind.ops import arguments, pairs
from m3bind.ops.contrastive import REDUCTIONS, Ids, Terms
from m3bind.ops.define import define, define_plain, differentiate
from m3bind.ops.ranks import ONE_RANK
from m3bind.ops.tangents import Moves, in_sums, of_rows, of_total, with_moves

_DIAGONAL = pairs.Pairs()  # to these operators no classes mean that row i and column i are positive


def siglip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # [] or [1]
    logit_bias: Tensor | float | None = None,  # [] or [1]
    *,
    labels: Tensor | None = None,  # [N] int64
    positive_ids: Ids | None = None,  # [N], [M] int64
    mask_ids: Ids | None = None,  # [N], [M] int64
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Sigmoid loss of all pairs without the N x M matrix of logits in memory.

    Equivalent to::

        logits = logit_scale * x @ y.T + logit_bias
        z = 2 * torch.eye(len(x)) - 1  # +1 at positives, -1 elsewhere
        return -F.logsigmoid(z * logits).sum() / len(x)

    Args:
        x, y: features, usually of unit norm; float32, bfloat16, float16 (logits are formed in
            float32) or float64. Under autocast they are cast, scale and bias are not.
        logit_scale, logit_bias: the factor itself, not its logarithm, and the bias; their gradients
            are exact.
        labels: the column of each row's positive; below 0 (-100): the row has none, and all its
            pairs are negative. Default: row i and column i, where M >= N.
        positive_ids: ids of rows and of columns (one tensor, where they are the same): equal ids
            are positives, any number a row.
        mask_ids: pairs with equal ids contribute nothing, unless they are positive: duplicates,
            other samples of the same patient, a row against itself.
        reduction: "mean" divides the sum over all pairs by N, the number of rows (not of pairs),
            as open_clip does; "sum"; "none": the sum of each row's pairs, [N]. Without rows the
            mean is NaN and the sum 0, as in torch.
        backend: a name from `m3bind.backends.BACKENDS`; default: see `m3bind.backends`.

    Returns:
        float32 (float64 for float64 features). Second derivatives: backend="reference" only. What
        is below the smallest normal number of that dtype (a pair of logit -88 in float32) may be 0.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, an unknown or unavailable
            backend.

    Source: Zhai et al. 2023, arXiv:2303.15343.
    """
    op = "siglip_loss"
    x, y = arguments.features(op, x, y)
    arguments.choice(op, "reduction", reduction, REDUCTIONS)
    scale = arguments.scalar(op, "logit_scale", logit_scale, x)
    bias = arguments.scalar(op, "logit_bias", 0.0 if logit_bias is None else logit_bias, x)
    if labels is None and positive_ids is None:
        arguments.paired(op, x, y)
    terms = None
    if labels is not None or positive_ids is not None or mask_ids is not None:
        terms = Terms.checked(
            op, x, y, y.shape[0], bias=bias, labels=labels, positive_ids=positive_ids,
            mask_ids=mask_ids,
        )  # fmt: skip
    chosen = backends.resolve(op, x.device.type, x.dtype, backend)
    with arguments.without_autocast(x):
        if chosen == "reference":
            return reference.siglip_loss(
                x, y, scale, bias, reduction=reduction, **({} if terms is None else terms.which()),
            )  # fmt: skip
        which = _DIAGONAL if terms is None else terms.pairs(x, y, ONE_RANK, _DIAGONAL)
        inputs = (
            x, y, scale, bias, which.row_class, which.col_class, which.row_mask, which.col_mask,
        )  # fmt: skip
        if reduction != "none" and arguments.gradient_wanted(x, y, scale, bias):
            total, *_ = torch.ops.m3bind.siglip_total_fwd(
                *inputs,
                reduction == "mean",
                arguments.gradient_wanted(x),
                arguments.gradient_wanted(y),
                chosen,
            )
            return total
        losses = torch.ops.m3bind.siglip_fwd(*inputs, chosen)
        if reduction != "none":
            losses = losses.sum() / (x.shape[0] if reduction == "mean" else 1)
        return losses.to(accumulation_dtype(x.dtype))


_INPUTS = (
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? row_class,"
    " Tensor? col_class, Tensor? row_mask, Tensor? col_mask"
)


def _fwd_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=statistics_dtype(x.device))


def _gradients(
    x: Tensor, y: Tensor, need_x: bool, need_y: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Gradients of x, y (no rows where it is not needed), scale and bias."""
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1]), dtype=dtype),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1]), dtype=dtype),
        *(x.new_empty((), dtype=accumulation_dtype(x.dtype)) for _ in range(2)),
    )


def _bwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, need_x, need_y, _ = rest
    return _gradients(x, y, need_x, need_y, x.dtype)


def _total_fwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    total = x.new_empty((), dtype=accumulation_dtype(x.dtype))
    *_, need_x, need_y, _ = rest
    return total, *_gradients(x, y, need_x, need_y, accumulation_dtype(x.dtype))


def _total_bwd(
    grad: Tensor,  # []
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    grad_x: Tensor,
    grad_y: Tensor,
    grad_scale: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, ...]:
    """The same in every backend. Only the product is rounded to 16 bit: it may hold a GradScaler's
    factor, without which gradients of float16 features would be 0."""
    return (
        (grad_x * grad).to(x.dtype),
        (grad_y * grad).to(y.dtype),
        grad_scale * grad,
        grad_bias * grad,
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad[:4]
    grads = torch.ops.m3bind.siglip_bwd(*ctx.saved_tensors, grad, *need[:2], ctx.backend)
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *(None,) * 5)


def _total_save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    # The inputs go along so that a double backward meets the refusal of siglip_total_bwd.
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _total_backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    # Where no second derivative can be asked for, there is nothing to refuse: no operator to call.
    second = torch.is_grad_enabled() or forward_ad._current_level >= 0
    multiply = torch.ops.m3bind.siglip_total_bwd if second else _total_bwd
    grads = multiply(grad, *ctx.saved_tensors)
    need = ctx.needs_input_grad[:4]
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=True)), *(None,) * 8)


def _tangents(inputs: tuple[Any, ...], moves: Moves, _: Any) -> tuple[Tensor]:
    x, y, scale, bias, *held, backend = inputs
    dx, dy, dscale, dbias, *_ = moves
    x, dx, y, dy = with_moves((x, dx), (y, dy))

    def gradient(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        ones = x.new_ones(x.shape[0], dtype=statistics_dtype(x.device))
        given = (x, y, scale, bias, *held, ones, True, False, backend)
        return torch.ops.m3bind.siglip_bwd(*given)[0]

    return (of_rows(x, dx, y, dy, scale, dscale, gradient, dbias),)


def _total_tangents(inputs: tuple[Any, ...], moves: Moves, _: Any) -> tuple[Tensor]:
    x, y, *rest, mean, _, _, backend = inputs
    x, y = in_sums(x), in_sums(y)
    need = (moves[0] is not None, moves[1] is not None)
    total, *grads = torch.ops.m3bind.siglip_total_fwd(x, y, *rest, mean, *need, backend)
    ones = torch.ones_like(total)
    grads = torch.ops.m3bind.siglip_total_bwd(ones, x, y, *rest[:2], *grads)
    return (of_total(grads, moves[:4]),)


define("siglip", "siglip_fwd", _INPUTS + ") -> Tensor", _fwd_fake)
define(
    "siglip",
    "siglip_bwd",
    _INPUTS + ", Tensor grad_rows, bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y,"
    " Tensor grad_scale, Tensor grad_bias)",
    _bwd_fake,
)
differentiate("siglip", _save, _backward, _tangents)
define(
    "siglip",
    "siglip_total_fwd",
    _INPUTS
    + ", bool mean, bool need_x, bool need_y) -> (Tensor total, Tensor grad_x, Tensor grad_y,"
    " Tensor grad_scale, Tensor grad_bias)",
    _total_fwd_fake,
)
define_plain(
    "siglip_total_bwd",
    "(Tensor grad, Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias,"
    " Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _total_bwd,
    _total_bwd,
)
differentiate("siglip_total", _total_save, _total_backward, _total_tangents)
