"""similarity_rank: at which place each query finds what it should, without the matrix of scores."""

from typing import Any

import torch
from torch import Tensor

from m3bind import backends, reference
from m3bind.ops import arguments
from m3bind.ops.define import define

Ids = Tensor | tuple[Tensor, Tensor]


def similarity_rank(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    labels: Tensor,  # [N] or [N, P] int64
    *,
    exclude_ids: Ids | None = None,  # [N], [M] int64
    backend: str | None = None,
) -> Tensor:  # int64, of the shape of labels
    """The rank of each query's positives among all rows of the gallery, in O(N * P + M) memory.

    Equivalent to::

        order = (queries @ gallery.T).sort(dim=1, descending=True, stable=True).indices
        return order.argsort(dim=1).gather(1, labels) + 1

    which is 1 plus the number of greater scores and of equal ones with a lower index. The score of
    the positive is the one that the comparison with all others uses, to the last bit, so a query in
    its own gallery has rank 1 if nothing is greater. `similarity_topk` finds a positive among its k
    exactly where the rank is from 1 to k. What is wanted of millions of queries follows::

        there = ranks > 0
        recall_at_10 = (ranks[there] <= 10).float().mean()
        median_rank = ranks[there].median()

    Args:
        queries, gallery: float32, bfloat16, float16 (scores are formed in float32) or float64.
            Under autocast they are cast.
        labels: rows of the gallery that each query should find; below 0: none.
        exclude_ids: ids of queries and of gallery rows (one tensor, where they are the same): rows
            with the query's id take no place.
        backend: a name from `m3bind.backends.BACKENDS`; default: see `m3bind.backends`.

    Returns:
        Ranks from 1; 0 for a label that is below 0 or whose row is left out. NaN is the largest
        score, as in `torch.topk`. Not differentiable.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, an unknown or unavailable
            backend.
    """
    op = "similarity_rank"
    queries, gallery = arguments.features(op, queries, gallery, ("queries", "gallery"))
    lists = arguments.label_lists(op, labels, queries, gallery)
    query_ids, gallery_ids = arguments.excluded(op, exclude_ids, queries, gallery)
    chosen = backends.resolve(op, queries.device.type, queries.dtype, backend)
    queries, gallery = queries.detach(), gallery.detach()
    with arguments.without_autocast(queries):
        if chosen == "reference":
            ranks = reference.similarity_rank(queries, gallery, lists, query_ids, gallery_ids)
        else:
            ranks = torch.ops.m3bind.similarity_rank_fwd(
                queries, gallery, lists, query_ids, gallery_ids, chosen
            )
    return ranks.reshape(labels.shape)


def _fake(queries: Tensor, gallery: Tensor, labels: Tensor, *rest: Any) -> Tensor:
    return labels.new_empty(labels.shape)


define(
    "similarity_rank",
    "similarity_rank_fwd",
    "(Tensor queries, Tensor gallery, Tensor labels, Tensor? query_ids, Tensor? gallery_ids)"
    " -> Tensor ranks",
    _fake,
)
