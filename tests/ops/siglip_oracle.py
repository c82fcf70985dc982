"""The independent truth of siglip_loss: float64, with the pairs as boolean matrices."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from clip_oracle import Results
from torch import Tensor

Pairs = dict[str, Tensor | tuple[Tensor, Tensor]]  # labels=, positive_ids=, mask_ids=


def positives(n: int, m: int, pairs: Pairs) -> Tensor:  # [N, M] bool
    out = torch.zeros(n, m, dtype=torch.bool)
    for i in range(n):
        if "labels" in pairs:
            if pairs["labels"][i] >= 0:
                out[i, pairs["labels"][i]] = True
        elif "positive_ids" in pairs:
            out[i] = pairs["positive_ids"][1] == pairs["positive_ids"][0][i]
        else:
            out[i, i] = True
    return out


def counted(n: int, m: int, pairs: Pairs) -> Tensor:  # [N, M] bool
    """Which pairs contribute."""
    if "mask_ids" not in pairs:
        return torch.ones(n, m, dtype=torch.bool)
    rows, cols = pairs["mask_ids"]
    return (rows[:, None] != cols) | positives(n, m, pairs)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    rows = losses.sum(1)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / len(rows)}[reduction]


def float64_loss(x, y, scale, bias, reduction="mean", **pairs):
    """softplus as a log-sum-exp with 0, which keeps the smallest losses."""
    n, m = len(x), len(y)
    z = 2.0 * positives(n, m, pairs) - 1.0
    logits = scale * x @ y.T + bias
    losses = torch.logaddexp(logits.new_zeros(()), -z * logits)
    return reduced(losses.where(counted(n, m, pairs), 0), reduction)


def float32_logits_loss(x, y, scale, bias, reduction="mean", **pairs):
    """What plain PyTorch makes of it, with logits in float32 also for 16-bit features."""
    n, m = len(x), len(y)
    z = 2.0 * positives(n, m, pairs) - 1.0
    logits = scale * x.float() @ y.float().T + bias
    return reduced(-F.logsigmoid(z * logits).where(counted(n, m, pairs), 0), reduction)


def run(
    loss: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    upstream: Tensor | None = None,
) -> Results:
    """The loss and all its gradients on fresh leaves."""
    x, y = (t.detach().clone().requires_grad_() for t in (x, y))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    s, b = (torch.as_tensor(t, dtype=wide).clone().requires_grad_() for t in (scale, bias))
    value = loss(x, y, s, b)
    value.backward(upstream)
    return {"loss": value.detach(), "x": x.grad, "y": y.grad, "scale": s.grad, "bias": b.grad}


def truth(x: Tensor, y: Tensor, scale: float, bias: float, upstream=None, **kwargs) -> Results:
    rounded = [torch.tensor(t).item() for t in (scale, bias)]  # to float32
    return run(
        lambda *a: float64_loss(*a, **kwargs), x.double(), y.double(), *rounded,
        None if upstream is None else upstream.double(),
    )  # fmt: skip


def sizes(x: Tensor, y: Tensor, scale: float, bias: float, **kwargs) -> dict[str, Tensor]:
    """What every result is a sum of, by absolute value: gradients cancel."""
    x, y = x.double(), y.double()
    logits = (scale * x @ y.T + bias).requires_grad_()
    losses = float64_loss(logits, torch.eye(len(y)).double(), 1.0, 0.0, **kwargs)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    grad = grad.abs()
    return {
        "loss": losses.detach(),
        "x": abs(scale) * grad @ y.abs(),
        "y": abs(scale) * grad.T @ x.abs(),
        "scale": (grad * (x @ y.T).abs()).sum(),
        "bias": grad.sum(),
    }
