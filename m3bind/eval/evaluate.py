"""Every figure of every stage, out of stored embeddings."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from m3bind.bars import progress_bar
from m3bind.eval.fewshot import FewShot, few_shot
from m3bind.eval.gap import modality_gap
from m3bind.eval.ranks import own_ranks
from m3bind.eval.retrieval import Retrieval, retrieve
from m3bind.eval.store import EmbeddingSet
from m3bind.eval.zeroshot import zero_shot

__all__ = ["STAGES", "evaluate"]

# "control" is stage 2 without stage 1: one text encoder distilled from experts that do not agree
STAGES = ("before", "aligned", "distilled", "control")
_IMAGE_STAGES = ("before", "aligned")  # the others leave the image towers as they are

Stage = Mapping[str, EmbeddingSet]  # by modality


def evaluate(
    test: Mapping[str, Stage],
    train: Mapping[str, Stage] | None = None,
    *,
    seed: int = 0,
    num_permutations: int = 200,
    shots: Sequence[int] = (1, 4, 16),
    num_shot_seeds: int = 5,
    progress: bool = False,
) -> dict[str, Any]:
    """The sections of metrics.json from zero_shot to modality_gap.

    ``test`` and ``train`` map a stage of :data:`STAGES` to its embeddings by modality; stages
    that were not run are left out. ``train`` serves the few-shot probe ("before", "aligned").
    What cannot be measured (no labels, a class with fewer samples than shots, no common
    condition) is absent from the result; it is never written as zero.
    """
    unknown = set(test) - set(STAGES)
    if unknown:
        raise ValueError(f"unknown stage {sorted(unknown)[0]!r}, expected one of {STAGES}")
    out: dict[str, Any] = {
        name: {} for name in ("zero_shot", "retrieval", "text_retrieval", "own_image", "few_shot")
    }
    out["modality_gap"] = {}
    jobs: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for stage, sets in test.items():
        pairs = (sets, num_permutations, seed)
        jobs.append(("zero_shot", stage, partial(_zero_shot, sets, seed)))
        jobs.append(("modality_gap", stage, partial(_gap, sets)))
        jobs.append(("text_retrieval", stage, partial(_text_pairs, *pairs)))
        jobs.append(("own_image", stage, partial(_own_image, sets)))
        if stage in _IMAGE_STAGES:
            jobs.append(("retrieval", stage, partial(_image_pairs, *pairs)))
            fit = (train or {}).get(stage, {})
            seeds = range(seed, seed + num_shot_seeds)
            jobs.append(("few_shot", stage, partial(_few_shot, fit, sets, shots, seeds)))
    for section, stage, job in progress_bar(
        jobs, desc="evaluate", unit="measure", disable=not progress
    ):
        result = job()
        if result:
            out[section][stage] = result
    reference = out["retrieval"].get("aligned") or out["retrieval"].get("before")
    if reference:
        # the level that the bound embeddings are judged against; each stage carries its own as
        # retrieval.<stage>.chance, because tighter clusters raise it
        out["retrieval"]["chance"] = {
            "map": dict(reference["chance"]),
            "normalised": dict.fromkeys(reference["chance"], 0.0),
            "permutations": num_permutations,
        }
    return out


def _with_mean(values: Mapping[str, float]) -> dict[str, float]:
    return {"mean": float(np.mean(list(values.values()))), **values} if values else {}


def _zero_shot(sets: Stage, seed: int) -> dict[str, Any]:
    kinds = sorted({kind for item in sets.values() for kind in item.prompts})
    out: dict[str, Any] = {}
    for kind in kinds:
        results = {
            name: zero_shot(
                item.image,
                item.labels,
                item.prompts[kind],
                seed=seed,
                where=f"the {kind!r} prompts of {name}",
            )
            for name, item in sets.items()
            # with the prompts of one class alone every answer would be right
            if len(item.prompts.get(kind, ())) > 1 and any(item.labels)
        }
        if not results:
            continue
        out[kind] = _with_mean({name: r.balanced_accuracy for name, r in results.items()})
        out.setdefault("interval", {})[kind] = {n: [r.low, r.high] for n, r in results.items()}
        out.setdefault("recall", {})[kind] = {name: r.recall for name, r in results.items()}
    return out


def _pairs(sets: Stage, num_permutations: int, seed: int, *, text: bool) -> dict[str, Retrieval]:
    results = {}
    for a, b in permutations(sets, 2):
        found = retrieve(
            sets[a].text if text else sets[a].image,
            sets[a].labels,
            sets[b].image,
            sets[b].labels,
            query_ids=sets[a].ids,
            gallery_ids=sets[b].ids,
            num_permutations=num_permutations,
            seed=seed,
        )
        if found is not None:
            results[f"{a}->{b}"] = found
    return results


def _image_pairs(sets: Stage, num_permutations: int, seed: int) -> dict[str, Any]:
    results = _pairs(sets, num_permutations, seed, text=False)
    if not results:
        return {}
    out: dict[str, Any] = {
        name: _with_mean({pair: getattr(r, name) for pair, r in results.items()})
        for name in ("map", "normalised", "chance")
    }
    for name in ("precision", "recall"):
        ks = next(iter(results.values())).precision
        out[name] = {
            str(k): _with_mean({pair: getattr(r, name)[k] for pair, r in results.items()})
            for k in ks
        }
    out["queries"] = {pair: r.num_queries for pair, r in results.items()}
    return out


def _text_pairs(sets: Stage, num_permutations: int, seed: int) -> dict[str, Any]:
    results = _pairs(sets, num_permutations, seed, text=True)
    if not results:
        return {}
    columns = {
        name: _with_mean({pair: getattr(r, name) for pair, r in results.items()})
        for name in ("map", "normalised", "chance")
    }
    return {**columns["map"], "normalised": columns["normalised"], "chance": columns["chance"]}


def _own_image(sets: Stage) -> dict[str, Any]:
    found = {
        name: own_ranks(item.text, item.image) for name, item in sets.items() if len(item.text)
    }
    if not found:
        return {}
    ks = next(iter(found.values())).recall
    return {
        "recall": {str(k): _with_mean({n: r.recall[k] for n, r in found.items()}) for k in ks},
        "median_rank": _with_mean({name: r.median for name, r in found.items()}),
        "gallery": {name: len(item) for name, item in sets.items() if name in found},
    }


def _few_shot(
    train: Stage, test: Stage, shots: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any]:
    out: dict[str, dict[str, Any]] = {}
    for name, item in train.items():
        if name not in test:
            continue
        classes = set(item.labels) - {""}
        if len(classes) < 2 or not any(test[name].labels):
            continue
        smallest = min(item.labels.count(label) for label in classes)
        for k in shots:
            if k <= smallest:
                result = few_shot(
                    item.image,
                    item.labels,
                    test[name].image,
                    test[name].labels,
                    num_shots=k,
                    seeds=seeds,
                )
                out.setdefault(name, {})[str(k)] = _spread(result)
    if not out:
        return {}
    means: dict[str, Any] = {}
    for k in shots:
        # the spread of the mean over modalities, seed by seed, not the mean of the spreads
        runs = [v[str(k)]["values"] for v in out.values() if str(k) in v]
        if runs:
            values = np.mean(runs, axis=0)
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            means[str(k)] = {
                "mean": float(values.mean()),
                "std": spread,
                "values": [float(v) for v in values],
            }
    return {"mean": means, **out}


def _spread(result: FewShot) -> dict[str, Any]:
    return {"mean": result.mean, "std": result.std, "values": list(result.values)}


def _gap(sets: Stage) -> dict[str, Any]:
    images = modality_gap({name: item.image for name, item in sets.items()})
    if not images:
        return {}
    return {**images, "text": modality_gap({name: item.text for name, item in sets.items()})}
