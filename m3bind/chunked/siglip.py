"""siglip: see `m3bind.ops.siglip`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind.chunked.panels import panels
from m3bind.dtypes import accumulation_dtype, statistics_dtype

# log(1 + exp(t)) is t to the last bit of a float64 above this; torch's default of 20 is not.
SOFTPLUS_LINEAR = 50.0


@dataclass(kw_only=True, slots=True)
class _Panel:
    """Some rows of the matrix."""

    at: slice
    x: Tensor  # [R, D]
    dots: Tensor  # [R, M]
    signed: Tensor  # [R, M], the loss is softplus of it: logits, negated at positives; masked: -inf
    sign: Tensor  # [R, M], -1 at positives, else 1

    def row_losses(self) -> Tensor:  # [R]
        return F.softplus(self.signed, threshold=SOFTPLUS_LINEAR).sum(1)

    def gradient(self) -> Tensor:  # [R, M]
        """The derivative of the losses by the logits, in place of `signed`."""
        return self.signed.sigmoid_().mul_(self.sign)


def _panel(
    at: slice,
    x: Tensor,
    wide_y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_class: Tensor | None,
    col_class: Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> _Panel:
    wide_x = x[at].to(wide_y.dtype)
    dots = wide_x @ wide_y.T
    signed = (dots * logit_scale).add_(logit_bias)
    if row_class is None or col_class is None:
        row_class = col_class = torch.arange(wide_y.shape[0], device=x.device)
    positive = row_class[at, None] == col_class
    sign = torch.ones_like(signed).masked_fill_(positive, -1)
    signed.mul_(sign)
    if row_mask is not None and col_mask is not None:
        masked = row_mask[at, None] == col_mask
        signed.masked_fill_(masked & ~positive, -torch.inf)
    return _Panel(at=at, x=wide_x, dots=dots, signed=signed, sign=sign)


class _Gradients:
    """Gradients of x, y (no rows where it is not needed), scale and bias, panel by panel."""

    def __init__(self, x: Tensor, wide_y: Tensor, need_x: bool, need_y: bool) -> None:
        self.wide_y, self.need_x, self.need_y = wide_y, need_x, need_y
        self.x = wide_y.new_zeros(x.shape[0] if need_x else 0, x.shape[1])
        self.y = wide_y.new_zeros(wide_y.shape[0] if need_y else 0, x.shape[1])
        self.scale, self.bias = wide_y.new_zeros(2, dtype=statistics_dtype(x.device))

    def add(self, panel: _Panel, grad: Tensor) -> None:
        if self.need_x:
            torch.mm(grad, self.wide_y, out=self.x[panel.at])
        if self.need_y:
            self.y.addmm_(grad.T, panel.x)
        self.bias += grad.sum()
        self.scale += grad.mul_(panel.dots).sum()

    def scaled(
        self, logit_scale: Tensor, factor: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        acc = self.wide_y.dtype
        by_logits = logit_scale.to(acc) * factor
        return (
            self.x.mul_(by_logits), self.y.mul_(by_logits), (self.scale * factor).to(acc),
            (self.bias * factor).to(acc),
        )  # fmt: skip


def siglip_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    row_class: Tensor | None,  # [N]
    col_class: Tensor | None,  # [M]
    row_mask: Tensor | None,  # [N]
    col_mask: Tensor | None,  # [M]
) -> Tensor:  # [N]
    """The sum of each row's losses."""
    losses = x.new_zeros(x.shape[0], dtype=statistics_dtype(x.device))
    wide_y = y.to(accumulation_dtype(x.dtype))
    for at in panels(x.shape[0], y.shape[0]):
        panel = _panel(
            at, x, wide_y, logit_scale, logit_bias, row_class, col_class, row_mask, col_mask
        )
        losses[at] = panel.row_losses()
        del panel  # before the next one is made
    return losses


def siglip_bwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    row_class: Tensor | None,  # [N]
    col_class: Tensor | None,  # [M]
    row_mask: Tensor | None,  # [N]
    col_mask: Tensor | None,  # [M]
    grad_rows: Tensor,  # [N]
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, D], [M, D], [], []
    """Gradients for a weight of each row; in the dtype of the features."""
    wide_y = y.to(accumulation_dtype(x.dtype))
    weights = grad_rows.to(wide_y.dtype)
    grads = _Gradients(x, wide_y, need_x, need_y)
    for at in panels(x.shape[0], y.shape[0]):
        panel = _panel(
            at, x, wide_y, logit_scale, logit_bias, row_class, col_class, row_mask, col_mask
        )
        grads.add(panel, panel.gradient().mul_(weights[at, None]))
        del panel  # before the next one is made
    grad_x, grad_y, grad_scale, grad_bias = grads.scaled(logit_scale)
    return grad_x.to(x.dtype), grad_y.to(y.dtype), grad_scale, grad_bias


def siglip_total_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    row_class: Tensor | None,  # [N]
    col_class: Tensor | None,  # [M]
    row_mask: Tensor | None,  # [N]
    col_mask: Tensor | None,  # [M]
    mean: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [], [N, D], [M, D], [], []
    """The sum of all losses (or that through N), and its gradients in the accumulation dtype."""
    wide_y = y.to(accumulation_dtype(x.dtype))
    total = x.new_zeros((), dtype=statistics_dtype(x.device))
    grads = _Gradients(x, wide_y, need_x, need_y)
    for at in panels(x.shape[0], y.shape[0]):
        panel = _panel(
            at, x, wide_y, logit_scale, logit_bias, row_class, col_class, row_mask, col_mask
        )
        total += panel.row_losses().sum(dtype=total.dtype)
        grads.add(panel, panel.gradient())
        del panel  # before the next one is made
    factor = 1 / max(1, x.shape[0]) if mean else 1.0
    gradients = grads.scaled(logit_scale, factor)
    # Without rows the mean is NaN, as in torch.
    return (total / x.shape[0] if mean else total).to(wide_y.dtype), *gradients
