"""The operators in plain PyTorch, a panel of rows at a time: O(N + M) memory on any device."""

import torch
from torch import Tensor

from m3bind.reference import accumulation_dtype, statistics_dtype

# Logits of one panel: 32 MiB in float32, enough rows for a library GEMM to run at full speed.
PANEL_ELEMENTS = 1 << 23


def _panels(num_rows: int, num_columns: int) -> list[slice]:
    step = max(1, min(1024, PANEL_ELEMENTS // max(1, num_columns)))
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def _logits(
    x: Tensor, y: Tensor, scale: Tensor, row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Dot products of one panel, and its logits with -inf where ids are equal."""
    dots = x @ y.T
    logits = dots * scale
    if row_ids is not None and col_ids is not None:
        logits.masked_fill_(row_ids[:, None] == col_ids[None, :], -torch.inf)
    return dots, logits


def _logsumexp(logits: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """torch.logsumexp with the maximum and the logarithm of the sum added in `dtype`."""
    if logits.shape[dim] == 0:
        return logits.sum(dim, dtype=dtype) - torch.inf
    shift = logits.amax(dim, keepdim=True)
    shift = shift.masked_fill(shift.abs() == torch.inf, 0.0)
    return shift.squeeze(dim).to(dtype) + (logits - shift).exp_().sum(dim).to(dtype).log()


def _weights(lse: Tensor, grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The LSE in `dtype`, and upstream gradients that make up for its rounding.

    A fully excluded row has the LSE -inf and only logits of -inf: any finite shift gives zeros.
    """
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    rounded = lse.to(dtype)
    return rounded, (grad * torch.exp(rounded - lse)).to(dtype)


def _part(ids: Tensor | None, rows: slice) -> Tensor | None:
    return None if ids is None else ids[rows]


def similarity_lse_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    row_ids: Tensor | None,  # [N]
    col_ids: Tensor | None,  # [M]
) -> tuple[Tensor, Tensor]:  # [N], [M]
    acc = accumulation_dtype(x.dtype)
    wide_y, scale = y.to(acc), logit_scale.to(acc)
    stats = statistics_dtype(x.device)
    row_lse = x.new_full((x.shape[0],), -torch.inf, dtype=stats)
    col_lse = x.new_full((y.shape[0],), -torch.inf, dtype=stats)
    for rows in _panels(x.shape[0], y.shape[0]):
        _, logits = _logits(x[rows].to(acc), wide_y, scale, _part(row_ids, rows), col_ids)
        row_lse[rows] = _logsumexp(logits, 1, stats)
        col_lse = torch.logaddexp(col_lse, _logsumexp(logits, 0, stats))
    return row_lse, col_lse


def similarity_lse_bwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    row_ids: Tensor | None,  # [N]
    col_ids: Tensor | None,  # [M]
    row_lse: Tensor,  # [N]
    col_lse: Tensor,  # [M]
    grad_row: Tensor,  # [N]
    grad_col: Tensor,  # [M]
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [M, D], []
    """Gradients of x, y and the scale; one that is not needed comes back empty, [0, D]."""
    acc = accumulation_dtype(x.dtype)
    wide_y, scale = y.to(acc), logit_scale.to(acc)
    row_lse, row_weight = _weights(row_lse, grad_row, acc)
    col_lse, col_weight = _weights(col_lse, grad_col, acc)
    grad_x = torch.zeros(x.shape if need_x else (0, x.shape[1]), dtype=acc, device=x.device)
    grad_y = torch.zeros(y.shape if need_y else (0, y.shape[1]), dtype=acc, device=y.device)
    grad_scale = torch.zeros((), dtype=acc, device=x.device)
    for rows in _panels(x.shape[0], y.shape[0]):
        part = x[rows].to(acc)
        dots, logits = _logits(part, wide_y, scale, _part(row_ids, rows), col_ids)
        grad = torch.exp(logits - row_lse[rows, None]).mul_(row_weight[rows, None])
        grad += logits.sub_(col_lse).exp_().mul_(col_weight)
        if need_x:
            torch.mm(grad, wide_y, out=grad_x[rows])
        if need_y:
            grad_y.addmm_(grad.T, part)
        grad_scale += grad.mul_(dots).sum()
    return grad_x.mul_(scale).to(x.dtype), grad_y.mul_(scale).to(y.dtype), grad_scale
