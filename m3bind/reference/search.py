"""Retrieval by stable sorts of the whole score matrix."""

import torch
from torch import Tensor

from m3bind.dtypes import accumulation_dtype


def _scores(
    queries: Tensor, gallery: Tensor, query_ids: Tensor | None, gallery_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All scores [N, M], and which pairs are left out."""
    acc = accumulation_dtype(queries.dtype)
    scores = queries.to(acc) @ gallery.to(acc).T
    if query_ids is None or gallery_ids is None:
        return scores, torch.zeros_like(scores, dtype=torch.bool)
    return scores, query_ids[:, None] == gallery_ids


def similarity_topk(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    k: int,
    query_ids: Tensor | None = None,  # [N] int64
    gallery_ids: Tensor | None = None,  # [M] int64
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k] int64
    """The k largest of each row of `queries @ gallery.T`; of equal ones the first.

    Where fewer than k are left: -inf and the index -1.
    """
    scores, excluded = _scores(queries, gallery, query_ids, gallery_ids)
    order = scores.detach().sort(dim=1, descending=True, stable=True).indices
    # A second sort, by one bit: an excluded pair comes after one whose score is -inf.
    kept_first = excluded.gather(1, order).long().sort(dim=1, stable=True).indices
    indices = order.gather(1, kept_first)[:, :k]
    found = ~excluded.gather(1, indices)
    values = scores.gather(1, indices).where(found, -torch.inf)
    missing = k - indices.shape[1]
    return (
        torch.nn.functional.pad(values, (0, max(0, missing)), value=-torch.inf),
        torch.nn.functional.pad(indices.where(found, -1), (0, max(0, missing)), value=-1),
    )


def similarity_rank(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    labels: Tensor,  # [N, P] int64
    query_ids: Tensor | None = None,  # [N] int64
    gallery_ids: Tensor | None = None,  # [M] int64
) -> Tensor:  # [N, P] int64
    """Where in a stable descending sort of its scores a query finds its labels, from 1.

    0 where a label is below 0 or left out.
    """
    scores, excluded = _scores(queries, gallery, query_ids, gallery_ids)
    if gallery.shape[0] == 0:
        return torch.zeros_like(labels)
    order = scores.detach().sort(dim=1, descending=True, stable=True).indices
    kept = ~excluded
    places = kept.gather(1, order).cumsum(1)
    place = torch.empty_like(places).scatter(1, order, places)
    at = labels.clamp(min=0)
    return place.gather(1, at).where((labels >= 0) & kept.gather(1, at), 0)
