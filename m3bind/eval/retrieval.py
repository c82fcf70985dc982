"""Label-based retrieval between modalities, with its chance level.

No patient has images of two modalities, so there is no paired image to find. A query of
modality A (an image, or a report) ranks all test patients of modality B; relevant are those who
have the query's condition.

**Queries** are the patients whose condition both modalities can show. "none" is no condition:
patients without a finding are never queries, but stay in the gallery as distractors, beside the
patients whose condition only B shows.

**Chance.** Even where A and B share nothing, B's own images cluster by condition, so a query
finds a whole cluster at once, the wrong one or the right one. Shuffling single patients would
break the clusters and give a chance that is too low (about the prevalence). The null hypothesis
here is instead "which cluster of B belongs to which condition of A is arbitrary": a draw
permutes the *names of B's classes* (all of them, "none" included), whole, uniformly among all
permutations, the identity and fixed points included, and leaves every embedding where it is.
The chance is the mean over the draws. Because fixed points are included, a perfectly bound
pair has a chance well above the prevalence (about 0.25 for eight equal classes), and the
normalised figure (mAP - chance) / (1 - chance) is the stricter for it.

**Ties** never depend on the order of the files: average precision takes the precision at the
end of a group of equal similarities for all of its members, as scikit-learn does, and
precision@k and recall@k are expectations over the random order within the group.

Average precision for every class needs the whole ranking of every query, with its groups of ties,
so this measure, and only this one, sorts all similarities of a test split. What needs the best few,
or the place of one, is in :mod:`m3bind.eval.ranks` and never holds the matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3bind.eval.store import as_unit

__all__ = ["Retrieval", "normalise", "retrieve"]

NO_FINDING = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieval:
    """Means over the queries. ``precision`` and ``recall`` are by k."""

    map: float
    chance: float
    chance_std: float
    normalised: float
    precision: dict[int, float]
    recall: dict[int, float]
    num_queries: int
    num_gallery: int


def normalise(value: float, chance: float) -> float:
    """(value - chance) / (1 - chance): 0 at chance, 1 when perfect, negative below chance."""
    return (value - chance) / (1.0 - chance) if chance < 1.0 else 0.0


def retrieve(
    query: Any,  # [Q, D] unit norm
    query_labels: Sequence[str],
    gallery: Any,  # [G, D] unit norm
    gallery_labels: Sequence[str],
    *,
    query_ids: Sequence[str] = (),
    gallery_ids: Sequence[str] = (),
    ks: Sequence[int] = (1, 5, 10),
    num_permutations: int = 200,
    seed: int = 0,
) -> Retrieval | None:
    """Mean average precision of ``(query @ gallery.T).argsort(descending)`` by label.

    The labels "" (unknown) are never queries and never relevant. Returns None where no query
    has a condition that occurs in the gallery. Raises ``ValueError`` where an id is in both.
    """
    query, gallery = as_unit(query, "query"), as_unit(gallery, "gallery")
    shared = set(query_ids) & set(gallery_ids)
    if shared:
        raise ValueError(f"{sorted(shared)[0]!r} is a query and in its own gallery")
    classes = sorted(set(gallery_labels) - {""})
    index = {label: i for i, label in enumerate(classes)}
    rows = [i for i, label in enumerate(query_labels) if label in index and label != NO_FINDING]
    if not rows:
        return None
    wanted = np.array([index[query_labels[i]] for i in rows])  # [Q]
    member = np.array([index.get(label, -1) for label in gallery_labels])  # [G]

    similarity = query[rows] @ gallery.T
    order = np.argsort(-similarity, axis=1, kind="stable")
    similarity = np.take_along_axis(similarity, order, axis=1)
    first, last = _tie_bounds(similarity)
    ranked = member[order]  # [Q, G]: the class found at each rank
    # AP of each query for each class that it could have been looking for: every permutation of
    # the classes then only picks other columns
    ap = np.stack([_average_precision(ranked == c, last) for c in range(len(classes))], axis=1)
    each = np.arange(len(rows))
    value = float(ap[each, wanted].mean())

    rng = np.random.default_rng(seed)
    draws = np.array(
        [ap[each, rng.permutation(len(classes))[wanted]].mean() for _ in range(num_permutations)]
    )
    chance = float(draws.mean()) if num_permutations else 0.0
    relevant = ranked == wanted[:, None]
    hits = {k: _expected_hits(relevant, first, last, k) for k in ks}
    total = relevant.sum(axis=1)
    return Retrieval(
        map=value,
        chance=chance,
        chance_std=float(draws.std()) if num_permutations else 0.0,
        normalised=normalise(value, chance),
        precision={k: float((h / k).mean()) for k, h in hits.items()},
        recall={k: float((h / total).mean()) for k, h in hits.items()},
        num_queries=len(rows),
        num_gallery=len(gallery),
    )


def _tie_bounds(
    similarity: np.ndarray,  # [Q, G], descending
) -> tuple[np.ndarray, np.ndarray]:
    """First and last rank (from 0) of the group of equal similarities around every rank."""
    num_queries, num_gallery = similarity.shape
    rank = np.arange(num_gallery)
    new = np.ones((num_queries, num_gallery), dtype=bool)
    new[:, 1:] = similarity[:, 1:] != similarity[:, :-1]
    first = np.maximum.accumulate(np.where(new, rank, 0), axis=1)
    end = np.ones_like(new)
    end[:, :-1] = new[:, 1:]
    last = np.minimum.accumulate(np.where(end, rank, num_gallery)[:, ::-1], axis=1)[:, ::-1]
    return first, last


def _average_precision(relevant: np.ndarray, last: np.ndarray) -> np.ndarray:
    """[Q]: the mean over the relevant of the precision at the end of their tie group."""
    found = np.cumsum(relevant, axis=1, dtype=np.int32)
    if (last[:, :-1] >= last[:, 1:]).any():  # ties
        found = np.take_along_axis(found, last, axis=1)
    return (relevant * found / (last + 1)).sum(axis=1) / relevant.sum(axis=1)


def _expected_hits(relevant: np.ndarray, first: np.ndarray, last: np.ndarray, k: int) -> np.ndarray:
    """[Q]: relevant ones among the first k, over random orders of each tie group."""
    # a group of size s that starts at rank f puts clip(k - f, 0, s) of its members into the top k
    chance = np.clip(k - first, 0, last - first + 1) / (last - first + 1)
    return (relevant * chance).sum(axis=1)
