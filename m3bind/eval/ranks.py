"""The nearest few of a gallery, and the place at which a query finds its own pair.

Both by the operators of :mod:`m3bind.ops`, which never hold the matrix of similarities: a gallery
of millions needs no more memory than its embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3bind.eval.store import as_unit
from m3bind.ops import similarity_rank, similarity_topk

__all__ = ["Ranks", "nearest", "own_ranks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """``recall`` by k: the part of the queries whose own pair is among the first k."""

    recall: dict[int, float]
    median: float
    num_queries: int


def _tensor(x: Any, name: str) -> Tensor:
    return torch.tensor(as_unit(x, name))  # a copy: arrays out of a file may be read-only


def nearest(
    query: Any,  # [Q, D] unit norm
    gallery: Any,  # [G, D] unit norm
    top: int,
) -> list[list[tuple[float, int]]]:
    """``(query @ gallery.T).topk(top)``: (similarity, row) of each query, nearest first.

    Equal similarities come in the order of the gallery; one of fewer than ``top`` rows is given
    whole.
    """
    similarity, row = similarity_topk(_tensor(query, "query"), _tensor(gallery, "gallery"), top)
    return [
        [(s, i) for s, i in zip(*found, strict=True) if i >= 0]
        for found in zip(similarity.tolist(), row.tolist(), strict=True)
    ]


def own_ranks(
    query: Any,  # [N, D] unit norm
    gallery: Any,  # [M, D] unit norm, row i belongs to query i; further rows are distractors
    ks: Sequence[int] = (1, 5, 10),
) -> Ranks:
    """``(query @ gallery.T).argsort(descending)``: where each query finds its own row.

    Raises ``ValueError`` without queries, or with more queries than rows.
    """
    query, gallery = _tensor(query, "query"), _tensor(gallery, "gallery")
    if not 0 < len(query) <= len(gallery):
        raise ValueError(f"{len(query)} queries for {len(gallery)} rows; each needs its own")
    ranks = similarity_rank(query, gallery, torch.arange(len(query)))
    return Ranks(
        recall={k: (ranks <= k).double().mean().item() for k in ks},
        median=ranks.double().quantile(0.5).item(),
        num_queries=len(query),
    )
