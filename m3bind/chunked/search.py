"""Retrieval in panels: see `m3bind.ops.topk` and `m3bind.ops.rank` for what the arguments mean."""

from collections.abc import Iterator

import torch
from torch import Tensor

from m3bind.chunked.panels import part
from m3bind.dtypes import accumulation_dtype

# Scores of one panel: 16 MiB in float32. Keys, where all of them are needed, are twice as large.
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
    scores = scores.masked_fill(scores == 0, 0.0).contiguous()
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


def _keys(scores: Tensor, excluded: Tensor | None) -> Tensor:
    keys = _ordered(scores)
    return keys if excluded is None else keys.masked_fill(excluded, _NOTHING)


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
        ids, some = part(query_ids, at), values[at].shape[0]
        keys, best, where = indices.new_empty(some, 0), values[at, :0], indices[at, :0]
        for columns, scores in _panels(queries, gallery, at):
            excluded = _excluded(ids, gallery_ids, columns)
            new = _best_places(scores, excluded, k)
            few = scores.gather(1, new)
            out = None if excluded is None else excluded.gather(1, new)
            # What is equal stays in the order of the gallery: before, and then by place.
            keys = torch.cat([keys, _keys(few, out)], 1)
            order = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
            keys = keys.gather(1, order)
            best = torch.cat([best, few], 1).gather(1, order)
            where = torch.cat([where, new + columns.start], 1).gather(1, order)
        nothing = keys == _NOTHING
        values[at, : keys.shape[1]] = best.masked_fill(nothing, -torch.inf)
        indices[at, : keys.shape[1]] = where.masked_fill(nothing, -1)
    return values, indices


def _best_places(scores: Tensor, excluded: Tensor | None, k: int) -> Tensor:
    """Where in a panel the k best of each row are, in ascending order."""
    few = min(k, scores.shape[1])
    kept = scores if excluded is None else scores.masked_fill(excluded, -torch.inf)
    best, places = kept.topk(few, dim=1, sorted=False)
    # topk takes any of equal ones at the last place: those rows are sorted.
    unclear = ~(kept < best.amin(1, keepdim=True))
    rows = (unclear.sum(1) > few).nonzero().squeeze(1)
    if rows.shape[0] > 0:
        keys = _keys(scores[rows], None if excluded is None else excluded[rows])
        places[rows] = keys.sort(dim=1, descending=True, stable=True).indices[:, :few]
    return places.sort(dim=1).values


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
            keys = _keys(scores, _excluded(ids, gallery_ids, columns))
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
