"""Cutting the rows into panels, and log-sum-exps that keep their last digits."""

import torch
from torch import Tensor

# Logits of one panel: 32 MiB in float32, enough rows for a library GEMM to run at full speed.
PANEL_ELEMENTS = 1 << 23


def panels(num_rows: int, num_columns: int, kept_rows: int = 0) -> list[slice]:
    """None of them is partly within the first `kept_rows`."""
    step = max(1, min(1024, PANEL_ELEMENTS // max(1, num_columns)))
    starts = [*range(0, kept_rows, step), *range(kept_rows, num_rows, step)]
    return [slice(i, j) for i, j in zip(starts, [*starts[1:], num_rows], strict=False)]


def logsumexp(logits: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """torch.logsumexp with the maximum and the logarithm of the sum added in `dtype`."""
    if logits.shape[dim] == 0:
        return logits.sum(dim, dtype=dtype) - torch.inf
    shift = logits.amax(dim, keepdim=True)
    shift = shift.masked_fill(shift.abs() == torch.inf, 0.0)
    return shift.squeeze(dim).to(dtype) + (logits - shift).exp_().sum(dim).to(dtype).log()


def weights(lse: Tensor, grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The LSE in `dtype`, and upstream gradients that make up for its rounding.

    A fully excluded row has the LSE -inf and only logits of -inf: any finite shift gives zeros.
    """
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    rounded = lse.to(dtype)
    return rounded, (grad * torch.exp(rounded - lse)).to(dtype)


def part(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]
