"""The independent truth of the contrastive tests: float64, and the error rule."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind import backends

_native = backends.native()
needs_native = pytest.mark.skipif(isinstance(_native, str), reason=str(_native))

Results = dict[str, Tensor]  # "loss", "x", "y", "scale"


def float64_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Mean symmetric InfoNCE without cancellation: cross_entropy is exact only to 1e-16."""
    logits = scale * x @ y.T
    diagonal = torch.eye(len(x), dtype=torch.bool)
    negatives = logits.masked_fill(diagonal, -torch.inf)
    positive = logits.diagonal()
    rows = torch.logaddexp(torch.zeros(()), negatives.logsumexp(1) - positive)
    cols = torch.logaddexp(torch.zeros(()), negatives.logsumexp(0) - positive)
    return (rows.mean() + cols.mean()) / 2


def float32_logits_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """What plain PyTorch makes of it, with logits in float32 also for 16-bit features."""
    logits = scale * x.float() @ y.float().T
    labels = torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def run(loss: Callable[..., Tensor], x: Tensor, y: Tensor, scale: float | Tensor) -> Results:
    """The loss and all its gradients on fresh leaves."""
    x, y = (t.detach().clone().requires_grad_() for t in (x, y))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = torch.as_tensor(scale, dtype=wide).clone().requires_grad_()
    value = loss(x, y, s)
    value.backward()
    return {"loss": value.detach(), "x": x.grad, "y": y.grad, "scale": s.grad}


def truth(x: Tensor, y: Tensor, scale: float) -> Results:
    rounded = scale if x.dtype == torch.float64 else torch.tensor(scale).item()
    return run(float64_loss, x.double(), y.double(), rounded)


def errors(got: Results, want: Results) -> dict[str, float]:
    """Ratio of norms, per result; a result whose truth is 0 counts by its own norm."""
    out = {}
    for name, value in want.items():
        norm = value.norm().item()
        out[name] = (got[name].double() - value).norm().item() / (norm if norm > 0 else 1.0)
    return out


def unit_pairs(
    n: int, d: int, *, seed: int, noise: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Rows of unit norm; y is x with noise of that norm, so that positives are hard or easy."""
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    y = F.normalize(x + noise * F.normalize(torch.randn(n, d, generator=generator), dim=1), dim=1)
    return x.to(dtype), y.to(dtype)


def in_a_cone(n: int, d: int, cone: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features [n, d] that have a direction in common, `cone` times what each has of its own."""
    generator = torch.Generator().manual_seed(0)
    middle = cone * F.normalize(torch.randn(d, generator=generator), dim=0)
    x, y = (
        F.normalize(F.normalize(torch.randn(n, d, generator=generator), dim=1) + middle, dim=1)
        for _ in range(2)
    )
    return x.to(dtype), y.to(dtype)
