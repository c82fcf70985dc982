"""Retrieval in panels: see `m3bind.ops.topk` and `m3bind.ops.rank` for what the arguments mean."""

from collections.abc import Iterator

import torch
from torch import Tensor

from m3bind.chunked.panels import part
from m3bind.dtypes import accumulation_dtype

# Scores of one panel. Its keys take another 32 MiB, and topk over them as much again.
PANEL_ELEMENTS = 1 << 22
PANEL_ROWS = 1024
# A score as an integer that is less than the key of any score: a pair that is left out.
_NOTHING = torch.iinfo(torch.int64).min


def _panels(queries: Tensor, gallery: Tensor, at: slice) -> Iterator[tuple[slice, Tensor]]:
    """Panels of the gallery and the scores of some queries with them, the same at every call."""
    acc = accumulation_dtype(queries.dtype)
    rows = queries[at].to(acc)
    step = max(1, PANEL_ELEMENTS // max(1, rows.shape[0]))
    for first in range(0, gallery.shape[0], step):
        columns = slice(first, min(first + step, gallery.shape[0]))
        yield columns, rows @ gallery[columns].to(acc).T


def _blocks(num_rows: int) -> list[slice]:
    return [slice(i, min(i + PANEL_ROWS, num_rows)) for i in range(0, num_rows, PANEL_ROWS)]


def _ordered(scores: Tensor) -> Tensor:
    """int64 in the order of the scores: -0 equals 0, NaN is greater than infinity."""
    # In two steps: a compiler may take -0 + 0 for -0.
    scores = (
        scores.masked_fill(scores == 0, 0.0).masked_fill(scores.isnan(), torch.nan).contiguous()
    )
    wide = scores.dtype == torch.float64
    bits = scores.view(torch.int64 if wide else torch.int32)
    largest = torch.iinfo(bits.dtype).max
    bits = torch.where(scores.isnan(), largest, bits)
    return torch.where(bits < 0, bits ^ largest, bits).long()


def _excluded(
    query_ids: Tensor | None, gallery_ids: Tensor | None, columns: slice
) -> Tensor | None:
    if query_ids is None or gallery_ids is None:
        return None
    return query_ids[:, None] == gallery_ids[columns]


def similarity_topk_fwd(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    k: int,
    query_ids: Tensor | None,  # [N]
    gallery_ids: Tensor | None,  # [M]
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k]
    num_rows, acc = queries.shape[0], accumulation_dtype(queries.dtype)
    values = queries.new_full((num_rows, k), -torch.inf, dtype=acc)
    indices = torch.full_like(values, -1, dtype=torch.int64)
    for at in _blocks(num_rows):
        best = _wide_best if acc == torch.float64 else _packed_best
        found, where = best(queries, gallery, k, part(query_ids, at), gallery_ids, at)
        values[at, : found.shape[1]], indices[at, : where.shape[1]] = found, where
    return values, indices


def _packed_best(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    query_ids: Tensor | None,
    gallery_ids: Tensor | None,
    at: slice,
) -> tuple[Tensor, Tensor]:
    """float32 scores: score and column make one integer, so that no two are equal for topk."""
    if gallery.shape[0] >= 1 << 32:
        raise ValueError(f"similarity_topk: {gallery.shape[0]} rows in the gallery; split it")
    best = queries.new_empty((len(range(*at.indices(queries.shape[0]))), 0), dtype=torch.int64)
    low = (1 << 32) - 1
    for columns, scores in _panels(queries, gallery, at):
        numbers = torch.arange(columns.start, columns.stop, device=gallery.device)
        keys = (_ordered(scores) << 32) | (low - numbers)
        excluded = _excluded(query_ids, gallery_ids, columns)
        if excluded is not None:
            keys.masked_fill_(excluded, _NOTHING)
        # Fewer than k of a panel may be better than all others, never more.
        few = keys.topk(min(k, keys.shape[1]), dim=1, sorted=False).values
        best = torch.cat([best, few], 1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    none = best == _NOTHING
    ordered = (best >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ torch.iinfo(torch.int32).max, ordered)
    return bits.view(torch.float32).masked_fill(none, -torch.inf), (low - (best & low)).masked_fill(
        none, -1
    )


def _wide_best(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    query_ids: Tensor | None,
    gallery_ids: Tensor | None,
    at: slice,
) -> tuple[Tensor, Tensor]:
    """float64 scores fill an integer, so equal ones are kept in order by a stable sort."""
    num_rows = len(range(*at.indices(queries.shape[0])))
    keys = queries.new_empty((num_rows, 0), dtype=torch.int64)
    values, indices = queries.new_empty((num_rows, 0)), keys
    for columns, scores in _panels(queries, gallery, at):
        new = _ordered(scores)
        excluded = _excluded(query_ids, gallery_ids, columns)
        if excluded is not None:
            new.masked_fill_(excluded, _NOTHING)
        numbers = torch.arange(columns.start, columns.stop, device=gallery.device)
        keys = torch.cat([keys, new], 1)
        order = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
        keys = keys.gather(1, order)
        values = torch.cat([values, scores], 1).gather(1, order)
        indices = torch.cat([indices, numbers.expand(num_rows, -1)], 1).gather(1, order)
    none = keys == _NOTHING
    return values.masked_fill(none, -torch.inf), indices.masked_fill(none, -1)


def similarity_rank_fwd(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    labels: Tensor,  # [N, P]
    query_ids: Tensor | None,  # [N]
    gallery_ids: Tensor | None,  # [M]
) -> Tensor:  # [N, P]
    ranks = labels.new_zeros(labels.shape)
    if gallery.shape[0] == 0:
        return ranks
    for at in _blocks(queries.shape[0]):
        ids, wanted = part(query_ids, at), labels[at]
        known = wanted >= 0
        if ids is not None and gallery_ids is not None:
            known &= ids[:, None] != gallery_ids[wanted.clamp(min=0)]
        # Both passes form the same panels: a separate dot product would differ in the last bit.
        own = torch.zeros_like(wanted)
        for columns, scores in _panels(queries, gallery, at):
            inside = (wanted >= columns.start) & (wanted < columns.stop)
            place = (wanted - columns.start).clamp(0, scores.shape[1] - 1)
            own = _ordered(scores).gather(1, place).where(inside, own)
        ranks[at] = known.long()
        for columns, scores in _panels(queries, gallery, at):
            keys = _ordered(scores)
            excluded = _excluded(ids, gallery_ids, columns)
            if excluded is not None:
                keys.masked_fill_(excluded, _NOTHING)
            numbers = torch.arange(columns.start, columns.stop, device=gallery.device)
            for slot in range(wanted.shape[1]):
                mine, label = own[:, slot, None], wanted[:, slot, None]
                better = (keys > mine) | ((keys == mine) & (numbers < label))
                ranks[at, slot] += better.sum(1).where(known[:, slot], 0)
    return ranks


def similarity_topk_bwd(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    indices: Tensor,  # [N, k]
    grad: Tensor,  # [N, k]
    need_queries: bool,
    need_gallery: bool,
) -> tuple[Tensor, Tensor]:  # [N, D], [M, D]
    """The gradient of `queries @ gallery.T` at the listed pairs; an empty one is not needed."""
    acc = accumulation_dtype(queries.dtype)
    features = queries.shape[1]
    listed = indices >= 0
    grad_queries = queries.new_zeros((queries.shape[0] if need_queries else 0, features), dtype=acc)
    grad_gallery = gallery.new_zeros((gallery.shape[0] if need_gallery else 0, features), dtype=acc)
    if gallery.shape[0] > 0:
        for slot in range(indices.shape[1]):
            # What is not listed is put to 0 last: 0 times a NaN would be one.
            at, there = indices[:, slot].clamp(min=0), listed[:, slot, None]
            weight = grad[:, slot, None].to(acc)
            if need_queries:
                grad_queries += (weight * gallery[at].to(acc)).where(there, 0)
            if need_gallery:
                grad_gallery.index_add_(0, at, (weight * queries.to(acc)).where(there, 0))
    return grad_queries.to(queries.dtype), grad_gallery.to(gallery.dtype)
