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

    ``hidden`` above 0 puts ``F.gelu(inner(features))``, that wide, before the projection: over a
    frozen tower a linear head cannot bring a finding and the name of its condition together.
    """

    def __init__(
        self, in_features: int, width: int, generator: torch.Generator, hidden: int = 0
    ) -> None:
        super().__init__()
        self.inner: nn.Linear | None = None
        if hidden:
            self.inner = nn.Linear(in_features, hidden)
            spread = in_features**-0.5
            with torch.no_grad():
                drawn = torch.rand(hidden, in_features, generator=generator)
                self.inner.weight.copy_((2 * drawn - 1) * spread)
                self.inner.bias.zero_()
            in_features = hidden
        gauss = torch.randn(max(in_features, width), min(in_features, width), generator=generator)
        basis, upper = torch.linalg.qr(gauss)
        basis = basis * upper.diagonal().sign()
        self.weight = nn.Parameter(basis if width >= in_features else basis.T.contiguous())

    def forward(self, features: Tensor) -> Tensor:  # [B, in_features] -> [B, width]
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.inner is not None:
                features = F.gelu(self.inner(features))
            return F.normalize(F.linear(features, self.weight), dim=-1)


def derive_seed(*parts: object) -> int:
    """A seed from names and numbers, the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
