"""The independent truth of retrieval: sorted Python lists of exact scores."""

import math

import pytest
import torch
from clip_oracle import needs_native
from torch import Tensor

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)
# float64 is not for the native kernels.
TYPED = [
    pytest.param(backend, dtype, marks=(needs_native,) if backend == "cpp" else ())
    for backend in ("reference", "chunked", "cpp")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if (backend, dtype) != ("cpp", torch.float64)
]


def integers(n: int, d: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: their dot products are exact in every dtype and order, and often equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (n, d), generator=generator).to(dtype)


def some_ids(n: int, *, seed: int, kinds: int = 7) -> Tensor:
    return torch.randint(0, kinds, (n,), generator=torch.Generator().manual_seed(seed))


def orders(
    queries: Tensor, gallery: Tensor, ids: tuple[Tensor, Tensor] | None = None
) -> list[list[tuple[float, int]]]:
    """For each query all (score, column) that may be found, best first: NaN, then descending."""
    # A product of each pair, not a matrix product: NaN * 0 must not depend on a library.
    scores = (queries.double()[:, None] * gallery.double()[None]).sum(2).tolist()
    found = []
    for i, row in enumerate(scores):
        kept = [
            (score, j)
            for j, score in enumerate(row)
            if ids is None or ids[0][i].item() != ids[1][j].item()
        ]
        found.append(sorted(kept, key=lambda it: (not math.isnan(it[0]), -it[0], it[1])))
    return found


def want_topk(found: list[list[tuple[float, int]]], k: int) -> tuple[Tensor, Tensor]:
    padded = [(row + [(-math.inf, -1)] * k)[:k] for row in found]
    values = torch.tensor([[score for score, _ in row] for row in padded], dtype=torch.float64)
    return values.reshape(-1, k), torch.tensor([[j for _, j in row] for row in padded]).reshape(
        -1, k
    )


def want_ranks(found: list[list[tuple[float, int]]], labels: Tensor) -> Tensor:
    out = torch.zeros_like(labels)
    for i, row in enumerate(found):
        place = {j: at for at, (_, j) in enumerate(row, 1)}
        for slot, label in enumerate(labels[i].tolist()):
            out[i, slot] = place.get(label, 0)
    return out


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert got[1].dtype == torch.int64
    torch.testing.assert_close(got[1], want[1].to(torch.int64), rtol=0, atol=0)
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=0, equal_nan=True)
