"""The report: one HTML file that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3bind.eval.charts import History, few_shot, losses
from m3bind.eval.drawings import WINDOWS, draw
from m3bind.eval.figures import (
    MARKS,
    condition_colours,
    heat_map,
    mark,
    project,
    scatter,
    title_of,
)
from m3bind.eval.gallery import Fetch, Search, choose_queries, search
from m3bind.eval.metrics import lookup, targets
from m3bind.eval.store import EmbeddingSet
from m3bind.files import atomic_write

__all__ = ["write_report"]

_MAP_POINTS = 130  # a modality, on the map: more hide each other, and t-SNE takes longer


def write_report(
    path: Path | str,
    metrics: Mapping[str, Any],
    *,
    test: Mapping[str, Mapping[str, EmbeddingSet]],
    histories: Mapping[str, History] | None = None,
    fetch: Fetch | None = None,
    dataset: str = "",
    description: str = "",
) -> Path:
    """Write the report of one run and return its path.

    ``test`` is what :func:`m3bind.eval.evaluate.evaluate` got. ``histories`` maps a title
    ("stage 1, align") to the run's metrics.jsonl or its lines. ``fetch`` gives the records that
    the gallery draws (:func:`m3bind.eval.gallery.fetch_from`); without it there is none.
    ``dataset`` is the data set's name, ``description`` one paragraph on how the run was set up.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("m3bind.eval"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["title"] = title_of
    environment.filters["figure"] = _figure
    seed = int(metrics.get("seed", 0))
    names = list(test.get("aligned") or test.get("before") or metrics.get("modalities", []))
    html = environment.get_template("report.html.j2").render(
        metrics=metrics,
        names=names,
        get=lambda key: lookup(metrics, key),
        targets=targets(metrics),
        cohort=_cohort(test),
        dataset=dataset,
        description=description,
        heat=_heat_maps(metrics, names),
        maps=_maps(test, seed),
        gallery=_gallery(test, fetch, seed) if fetch else [],
        windows=WINDOWS,
        few_shot=few_shot(metrics),
        losses=losses(histories or {}),
        total_seconds=_total_seconds(metrics),
    )
    path = Path(path)
    with atomic_write(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return path


def _figure(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _cohort(test: Mapping[str, Mapping[str, EmbeddingSet]]) -> dict[str, Any]:
    sets = test.get("before") or test.get("aligned") or {}
    labels = list(dict.fromkeys(label for item in sets.values() for label in item.labels))
    labels.sort(key=lambda label: (label == "", label != "none"))
    counts = {label: [item.labels.count(label) for item in sets.values()] for label in labels}
    return {"names": list(sets), "counts": counts, "total": [len(item) for item in sets.values()]}


def _heat_maps(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    wanted = {
        "images": [
            ("retrieval.chance.map", "Chance"),
            ("retrieval.before.map", "Before binding"),
            ("retrieval.aligned.map", "After stage 1"),
        ],
        "normalised": [
            ("retrieval.before.normalised", "Before, normalised"),
            ("retrieval.aligned.normalised", "After stage 1, normalised"),
        ],
        "text": [
            ("text_retrieval.control", "Control: stage 2 without stage 1"),
            ("text_retrieval.aligned", "Experts' own, after stage 1"),
            ("text_retrieval.distilled", "Shared encoder, after stage 2"),
        ],
    }
    return {
        group: [
            heat_map(values, names, names, title=title)
            for key, title in items
            if (values := lookup(metrics, key))
        ]
        for group, items in wanted.items()
    }


def _maps(test: Mapping[str, Mapping[str, EmbeddingSet]], seed: int) -> dict[str, Any]:
    stages = [(s, t) for s, t in (("before", "Before binding"), ("aligned", "After stage 1"))
              if test.get(s)]  # fmt: skip
    if not stages:
        return {}
    labels = sorted({v for _, sets in test.items() for item in sets.values() for v in item.labels})
    colours = condition_colours(labels)
    drawn = []
    for stage, title in stages:
        sets = test[stage]
        # the same patients on both maps
        rows = {
            name: np.sort(np.random.default_rng(seed).permutation(len(item))[:_MAP_POINTS])
            for name, item in sets.items()
        }
        flat = project([sets[name].image[rows[name]] for name in sets], seed=seed)
        drawn.append(
            scatter(
                dict(zip(sets, flat, strict=True)),
                {name: [item.labels[i] for i in rows[name]] for name, item in sets.items()},
                colours,
                title=title,
                seed=seed,
            )
        )

    def sample(shape: str, colour: str) -> str:
        return f'<svg viewBox="0 0 14 14" class="key">{mark(shape, 7, 7, 5, colour)}</svg>'

    return {
        "drawn": drawn,
        "shapes": [
            (sample(MARKS[i % len(MARKS)], "#333"), n) for i, n in enumerate(test[stages[0][0]])
        ],
        "colours": [(sample("circle", c), label) for label, c in colours.items() if label],
    }


def _gallery(
    test: Mapping[str, Mapping[str, EmbeddingSet]], fetch: Fetch, seed: int
) -> list[dict[str, Any]]:
    sets = test.get("aligned") or test.get("before") or {}
    before = test.get("before") if test.get("aligned") else None
    found = [search(sets, m, row, before=before) for m, row in choose_queries(sets, seed=seed)]
    wanted: dict[str, list[str]] = {}
    for one in found:
        wanted.setdefault(one.modality, []).append(one.id)
        for answer in one.answers:
            wanted.setdefault(answer.modality, []).extend(hit.id for hit in answer.hits)
    records = {
        (modality, key): record
        for modality, ids in wanted.items()
        for key, record in fetch(modality, sorted(set(ids))).items()
    }
    return [_drawn(one, records) for one in found]


def _drawn(one: Search, records: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    def picture(modality: str, key: str, label: str, large: bool = False) -> dict[str, Any]:
        record = records.get((modality, key))
        if record is None:
            return {"html": "", "kind": "", "findings": "the record was not found in the data set"}
        whose = "simulated " if record.simulated else ""
        alt = f"{whose}{title_of(modality)} of a patient with {title_of(label) or 'no label'}"
        return {
            "html": draw(record, alt=alt, large=large),
            "kind": record.kind,
            "findings": _findings(record.report, 900 if large else 190),
        }

    return {
        "modality": one.modality,
        "label": one.label,
        "id": one.id,
        "picture": picture(one.modality, one.id, one.label, large=True),
        "answers": [
            {
                "modality": answer.modality,
                "before": answer.before,
                "possible": any(hit.right is not None for hit in answer.hits),
                "hits": [(hit, picture(answer.modality, hit.id, hit.label)) for hit in answer.hits],
            }
            for answer in one.answers
        ],
    }


def _findings(report: str, limit: int) -> str:
    from m3bind.data.reports import sections

    parts = sections(report)
    text = " ".join((parts.findings or parts.whole).split())
    return text if len(text) <= limit else text[: limit - 1].rsplit(" ", 1)[0] + " …"


def _total_seconds(metrics: Mapping[str, Any]) -> float:
    """Without the parts of a stage that is measured as a whole ("pretrain/ct" in "pretrain")."""
    seconds = metrics.get("seconds", {})
    return sum(v for k, v in seconds.items() if not ("/" in k and k.split("/")[0] in seconds))
