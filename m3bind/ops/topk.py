"""similarity_topk: the best rows of a gallery for each query, without the matrix of scores."""

from typing import Any

import torch
from torch import Tensor

from m3bind import backends, chunked, reference
from m3bind.dtypes import accumulation_dtype
from m3bind.ops import arguments, listed
from m3bind.ops.define import define, define_plain, differentiate
from m3bind.ops.tangents import Moves

LARGEST_K = 1024

Ids = Tensor | tuple[Tensor, Tensor]


def similarity_topk(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    k: int,
    *,
    exclude_ids: Ids | None = None,  # [N], [M] int64
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k] int64
    """The k nearest rows of the gallery by dot product, in O(N * k + M) memory.

    Equivalent to::

        scores = queries @ gallery.T
        scores[query_ids[:, None] == gallery_ids] = -inf  # and never found
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]

    Equal scores come in the order of the gallery, at the k-th place too; -0 equals 0. In the "cpp"
    backend equal rows have equal scores wherever they stand; "triton" and "cuda" are written so,
    and have not yet run on a GPU; "reference" and "chunked" take the scores of a library's matrix
    product, whose last bit may depend on the place. NaN is the largest value, as
    in `torch.topk`: a gallery row with NaN comes first, and a query with NaN has the values NaN and
    the indices 0 to k - 1 (those that are not left out).

    Args:
        queries, gallery: float32, bfloat16, float16 (scores are formed in float32) or float64.
            Under autocast they are cast.
        k: 1 to 1024; it may exceed M.
        exclude_ids: ids of queries and of gallery rows (one tensor, where they are the same): pairs
            with equal ids are never found, so that a query does not find itself.
        backend: a name from `m3bind.backends.BACKENDS`; default: see `m3bind.backends`.

    Returns:
        values, float32 (float64 for float64 features), descending, and indices; where fewer than k
        rows are left, -inf and -1. Values are differentiable; of second derivatives
        backend="reference" alone has all.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, an unknown or unavailable
            backend.
    """
    op = "similarity_topk"
    queries, gallery = arguments.features(op, queries, gallery, ("queries", "gallery"))
    k = arguments.integer(op, "k", k, 1, LARGEST_K)
    query_ids, gallery_ids = arguments.excluded(op, exclude_ids, queries, gallery)
    chosen = backends.resolve(op, queries.device.type, queries.dtype, backend)
    with arguments.without_autocast(queries):
        if chosen == "reference":
            return reference.similarity_topk(queries, gallery, k, query_ids, gallery_ids)
        return torch.ops.m3bind.similarity_topk_fwd(
            queries, gallery, k, query_ids, gallery_ids, chosen
        )


def _fwd_fake(queries: Tensor, gallery: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=accumulation_dtype(queries.dtype)),
        queries.new_empty(shape, dtype=torch.int64),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    queries, gallery, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(queries, gallery, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, gallery, indices = ctx.saved_tensors
    need_queries, need_gallery = ctx.needs_input_grad[:2]
    grad_queries, grad_gallery = torch.ops.m3bind.similarity_topk_bwd(
        queries, gallery, indices, grad, need_queries, need_gallery
    )
    return (
        grad_queries if need_queries else None,
        grad_gallery if need_gallery else None,
        *(None,) * 4,
    )


def _tangents(
    inputs: tuple[Any, ...], moves: Moves, output: tuple[Tensor, Tensor]
) -> tuple[Tensor]:
    queries, gallery, *_ = inputs
    indices = output[1]
    moved = listed.moved_dots(queries, gallery, indices.clamp(min=0), *moves[:2])
    return (moved.where(indices >= 0, 0),)


define(
    "similarity_topk",
    "similarity_topk_fwd",
    "(Tensor queries, Tensor gallery, int k, Tensor? query_ids, Tensor? gallery_ids)"
    " -> (Tensor values, Tensor indices)",
    _fwd_fake,
)
# The backward pass is N * k listed pairs: the same few lines for every backend.
define_plain(
    "similarity_topk_bwd", listed.GRADIENT, chunked.similarity_topk_bwd, listed.gradient_fake
)
differentiate("similarity_topk", _save, _backward, _tangents)
