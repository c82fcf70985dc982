"""What a search finds: queries drawn at random, and their nearest neighbours elsewhere."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3bind.eval.ranks import nearest
from m3bind.eval.store import EmbeddingSet

__all__ = ["Answer", "Fetch", "Hit", "Search", "choose_queries", "fetch_from", "search"]

# (modality, ids) -> {id: m3bind.data.records.Record}; ids that are not found may be absent
Fetch = Callable[[str, Sequence[str]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A record that was found. ``right`` is None where the modality cannot show the condition."""

    id: str
    label: str
    similarity: float
    right: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The nearest of one modality, nearest first; ``before`` holds their labels before binding."""

    modality: str
    hits: tuple[Hit, ...]
    before: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """One query, and its answer from every other modality."""

    modality: str
    id: str
    label: str
    answers: tuple[Answer, ...]


def choose_queries(
    sets: Mapping[str, EmbeddingSet],
    *,
    prefer: Sequence[str] = ("xray", "ecg", "retina"),
    count: int = 3,
    seed: int = 0,
) -> list[tuple[str, int]]:
    """``count`` queries (modality, row), one a modality, drawn at random, never by their result.

    Only among the conditions that most other modalities show, since elsewhere nothing right can
    be found; a condition is not asked for twice while there are others.
    """
    rng = np.random.default_rng(seed)
    shown = Counter(label for item in sets.values() for label in set(item.labels))
    order = [m for m in prefer if m in sets] + [m for m in sets if m not in prefer]
    chosen: list[tuple[str, int]] = []
    asked: set[str] = set()
    for modality in order:
        labels = sets[modality].labels
        conditions = sorted(c for c in set(labels) - {"", "none"} if shown[c] > 1)
        fresh = [c for c in conditions if c not in asked] or conditions
        if not fresh or len(chosen) == count:
            continue
        most = max(shown[c] for c in fresh)
        condition = str(rng.choice([c for c in fresh if shown[c] == most]))
        asked.add(condition)
        rows = [i for i, label in enumerate(labels) if label == condition]
        chosen.append((modality, int(rng.choice(rows))))
    return chosen


def search(
    sets: Mapping[str, EmbeddingSet],
    modality: str,
    row: int,
    *,
    before: Mapping[str, EmbeddingSet] | None = None,
    top: int = 3,
) -> Search:
    """The ``top`` nearest images of every other modality, by cosine similarity."""
    label = sets[modality].labels[row]
    query = sets[modality].image[row : row + 1]
    answers = []
    for name, item in sets.items():
        if name == modality:
            continue
        possible = label in item.labels
        earlier: tuple[str, ...] = ()
        if before and name in before and modality in before:
            found = nearest(before[modality].image[row : row + 1], before[name].image, top)
            earlier = tuple(before[name].labels[i] for _, i in found[0])
        answers.append(
            Answer(
                modality=name,
                hits=tuple(
                    Hit(
                        id=item.ids[i],
                        label=item.labels[i],
                        similarity=similarity,
                        right=item.labels[i] == label if possible else None,
                    )
                    for similarity, i in nearest(query, item.image, top)[0]
                ),
                before=earlier,
            )
        )
    return Search(
        modality=modality, id=sets[modality].ids[row], label=label, answers=tuple(answers)
    )


def fetch_from(root: Any, split: str = "test") -> Fetch:
    """Records out of a data set's shards; each modality is read once, up to the last one asked."""

    def fetch(modality: str, ids: Sequence[str]) -> dict[str, Any]:
        from m3bind.data.shards import iter_records

        wanted, found = set(ids), {}
        for record in iter_records(root, modality, split):
            if record.id in wanted:
                found[record.id] = record
                if len(found) == len(wanted):
                    break
        return found

    return fetch
