"""Features of the losses in any combination, of few rows and fewer ids, for tests of properties."""

from typing import Any

import torch
from properties import st
from torch import Tensor

POSITIVES = ("diagonal", "labels", "positive_ids", "soft_targets")
SHAPES = {"n": st.integers(0, 7), "m": st.integers(0, 7), "d": st.integers(1, 9)}
SEEDS = st.integers(0, 10**6)
MASKS = st.sampled_from([None, 1, 3])  # kinds of ids
DIRECTIONS = st.sampled_from(["both", "rows", "columns"])


class Draw:
    """Tensors by one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)

    def ids(self, n: int, m: int, kinds: int) -> tuple[Tensor, Tensor]:
        return self.integers(0, kinds, n), self.integers(0, kinds, m)

    def masks(self, n: int, m: int, kinds: int | None) -> dict[str, Any]:
        return {} if kinds is None else {"mask_ids": self.ids(n, m, kinds)}

    def positives(self, n: int, m: int, kind: str) -> dict[str, Any]:
        if kind == "labels":
            return {"labels": self.integers(-2, m, n)}
        if kind == "soft_targets":
            order = torch.rand(n, m + 2, generator=self.generator).argsort(1)[:, :2]
            columns = order.where(order < m, -100)  # distinct, some of them none
            return {"soft_targets": (columns, self.normal(n, 2).clamp(min=0))}
        if kind == "positive_ids" or n > m:
            return {"positive_ids": self.ids(n, m, 3)}
        return {}
