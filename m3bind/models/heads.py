"""Projections from a tower's own width into the width that all towers share."""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Head(nn.Module):
    """``F.normalize(F.linear(features.float(), weight), dim=-1)``, with a semi-orthogonal start.

    A semi-orthogonal matrix keeps the cosines between features wherever the shared width is at
    least the tower's own, so an image and a text head that start from the same ``generator``
    keep the alignment that a pre-trained pair of towers brings along. Heads of two *experts*
    must never start alike: they would be bound before any training.

    ``hidden`` above 0 adds ``outer(F.gelu(inner(features)))``, that wide, before the norm: over a
    frozen tower a linear head cannot bring a finding and the name of its condition together.
    ``outer`` starts at zero, so the head starts as the linear one does.
    """

    def __init__(
        self, in_features: int, width: int, generator: torch.Generator, hidden: int = 0
    ) -> None:
        super().__init__()
        gauss = torch.randn(max(in_features, width), min(in_features, width), generator=generator)
        basis, upper = torch.linalg.qr(gauss)
        basis = basis * upper.diagonal().sign()
        self.weight = nn.Parameter(basis if width >= in_features else basis.T.contiguous())
        self.hidden: nn.Sequential | None = None
        if hidden:
            inner, outer = nn.Linear(in_features, hidden), nn.Linear(hidden, width, bias=False)
            with torch.no_grad():
                drawn = torch.rand(hidden, in_features, generator=generator)
                inner.weight.copy_((2 * drawn - 1) * in_features**-0.5)
            nn.init.zeros_(inner.bias)
            nn.init.zeros_(outer.weight)
            self.hidden = nn.Sequential(inner, nn.GELU(), outer)

    def forward(self, features: Tensor) -> Tensor:  # [B, in_features] -> [B, width]
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            projected = F.linear(features, self.weight)
            if self.hidden is not None:
                projected = projected + self.hidden(features)
            return F.normalize(projected, dim=-1)


def derive_seed(*parts: object) -> int:
    """A seed from names and numbers, the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
