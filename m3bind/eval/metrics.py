"""metrics.json: its schema, its assembly, and what the run must show.

::

    zero_shot.{before,aligned,distilled,control}.{name,findings}.{mean,<modality>}
             balanced accuracy; .interval and .recall beside the kinds of prompt hold details
    retrieval.{before,aligned}.{map,normalised,chance}.{mean,<query>-><gallery>}
             .precision.<k>, .recall.<k>, .queries beside them
    retrieval.chance.{map,normalised}      chance of the aligned stage; normalised is 0 by name
    text_retrieval.{before,aligned,distilled,control}.{mean,<report>-><gallery>}   raw mAP
             .normalised, .chance beside them
    own_image.{before,aligned,distilled,control}.{recall.<k>,median_rank}.{mean,<modality>}
             each report looks for its own image among all of its modality; .gallery counts those
    few_shot.{before,aligned}.{mean,<modality>}.<k>.{mean,std,values}
    modality_gap.<stage>.{mean,<a><-><b>}; .text is the same of the reports' embeddings
    seconds.<stage>, peak_rss_mib.<stage>, simulated, versions, seed, modalities
"""

import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from m3bind.errors import M3BindError
from m3bind.files import atomic_write

__all__ = ["Target", "assemble", "load_metrics", "save_metrics", "targets", "validate", "versions"]

_PACKAGES = (
    "m3bind",
    "torch",
    "numpy",
    "scikit-learn",
    "transformers",
    "tokenizers",
    "timm",
    "open_clip_torch",
    "peft",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
)


class Target(NamedTuple):
    """One demand on a run. ``value`` is None where the run did not measure it."""

    demand: str
    value: float | None
    threshold: float
    met: bool


def versions() -> dict[str, str]:
    """Versions of Python, the platform and of the installed packages that decide the figures."""
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def assemble(
    evaluation: Mapping[str, Any],
    *,
    seconds: Mapping[str, float],
    peak_rss_mib: Mapping[str, float],
    simulated: bool,
    seed: int,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of metrics.json: :func:`~m3bind.eval.evaluate.evaluate`'s result and the run.

    ``seconds`` and ``peak_rss_mib`` are by stage; ``extra`` (e.g. ``{"commit": ...}``) is merged
    at the top level and may not replace a key.
    """
    zero_shot = evaluation.get("zero_shot", {}).get("before", {})
    gaps = evaluation.get("modality_gap", {}).get("before", {})
    names = [k for k in zero_shot.get("name", {}) if k != "mean"] or sorted(
        {part for k in gaps if "<->" in k for part in k.split("<->")}
    )
    out: dict[str, Any] = {
        **evaluation,
        "seconds": {k: float(v) for k, v in seconds.items()},
        "peak_rss_mib": {k: float(v) for k, v in peak_rss_mib.items()},
        "simulated": bool(simulated),
        "seed": int(seed),
        "modalities": names,
        "versions": versions(),
    }
    clash = set(out) & set(extra or {})
    if clash:
        raise ValueError(f"extra may not replace {sorted(clash)}")
    return {**out, **(extra or {})}


def save_metrics(metrics: Mapping[str, Any], path: Path | str) -> None:
    """Write JSON atomically; NaN and infinity are refused (``ValueError``), as JSON has none."""
    content = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    with atomic_write(Path(path)) as partial:
        partial.write_text(content, encoding="utf-8")


def load_metrics(path: Path | str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise M3BindError(f"{path} is damaged ({error}): run m3bind eval again") from None


def validate(metrics: Mapping[str, Any]) -> None:
    """Check a complete run (all stages, all ordered pairs) against the schema.

    Raises one ``ValueError`` that lists every missing key and every value out of its range.
    """
    problems: list[str] = []
    names = list(metrics.get("modalities", []))
    if len(names) < 2:
        problems.append("modalities: fewer than two")
    pairs = [f"{a}->{b}" for a, b in permutations(names, 2)]

    def number(path: str, low: float = 0.0, high: float = 1.0) -> None:
        value = lookup(metrics, path)
        if value is None:
            problems.append(f"{path}: missing")
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            problems.append(f"{path}: {value!r} is not a number")
        elif not (math.isfinite(value) and low <= value <= high):
            problems.append(f"{path}: {value} is not within [{low:g}, {high:g}]")

    for stage in ("before", "aligned", "distilled"):
        for kind in ("name", "findings"):
            for key in ["mean", *names]:
                number(f"zero_shot.{stage}.{kind}.{key}")
    for stage in ("chance", "before", "aligned"):
        for key in ["mean", *pairs]:
            number(f"retrieval.{stage}.map.{key}")
            number(f"retrieval.{stage}.normalised.{key}", low=-math.inf)
    for stage in ("aligned", "distilled", "control"):
        for key in ["mean", *pairs]:
            number(f"text_retrieval.{stage}.{key}")
    for stage in ("before", "aligned", "distilled"):
        for key in ["mean", *names]:
            number(f"own_image.{stage}.median_rank.{key}", low=1.0, high=math.inf)
            for k in lookup(metrics, f"own_image.{stage}.recall") or {"1": None}:
                number(f"own_image.{stage}.recall.{k}.{key}")
    for stage in ("before", "aligned"):
        number(f"modality_gap.{stage}.mean", high=2.0)
        for key in ["mean", *names]:
            probes = lookup(metrics, f"few_shot.{stage}.{key}")
            if not probes:
                problems.append(f"few_shot.{stage}.{key}: missing")
            for k in probes or {}:
                number(f"few_shot.{stage}.{key}.{k}.mean")
    for section in ("seconds", "peak_rss_mib"):
        stages = metrics.get(section)
        if not stages:
            problems.append(f"{section}: missing")
        for stage in stages or {}:
            number(f"{section}.{stage}", high=math.inf)
    kinds: dict[str, type] = {"simulated": bool, "seed": int, "versions": dict}
    for key, expected in kinds.items():
        if not isinstance(metrics.get(key), expected):
            problems.append(f"{key}: expected {expected.__name__}, got {metrics.get(key)!r}")
    if problems:
        raise ValueError("metrics.json is not complete:\n  " + "\n  ".join(problems))


def lookup(metrics: Mapping[str, Any], path: str) -> Any:
    """``metrics["a"]["b"]`` for "a.b", None where a key is missing."""
    node: Any = metrics
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def targets(metrics: Mapping[str, Any]) -> list[Target]:
    """What a demonstration must show, with what it did show. No margin is hidden in here."""

    def get(path: str) -> float | None:
        return lookup(metrics, path)

    before, aligned = get("zero_shot.before.name.mean"), get("zero_shot.aligned.name.mean")
    distilled = get("zero_shot.distilled.name.mean")
    text = {s: get(f"text_retrieval.{s}.mean") for s in ("aligned", "distilled", "control")}
    raw = {s: lookup(metrics, f"retrieval.{s}.map") or {} for s in ("before", "aligned")}
    gains = [raw["aligned"][p] - raw["before"][p] for p in raw["before"] if p in raw["aligned"]]

    def least(demand: str, value: float | None, threshold: float, *, above: bool = False) -> Target:
        met = value is not None and (value > threshold if above else value >= threshold)
        return Target(demand, value, threshold, met)

    before_map = get("retrieval.before.map.mean")
    return [
        Target(
            "Retrieval between modalities before binding: raw mAP at most 0.35 "
            "(higher would mean that the experts were bound by construction)",
            before_map,
            0.35,
            before_map is not None and before_map <= 0.35,
        ),
        least(
            "Retrieval between modalities after stage 1: normalised mAP at least 0.45",
            get("retrieval.aligned.normalised.mean"),
            0.45,
        ),
        least(
            "Every ordered pair retrieves better after stage 1 than before (smallest gain in mAP)",
            min(gains) if gains else None,
            0.0,
            above=True,
        ),
        least("Zero-shot by name before binding: at least 0.80", before, 0.80),
        least(
            "Zero-shot by name after stage 1: at most 0.03 below before",
            aligned,
            _shift(before, -0.03),
        ),
        least(
            "Zero-shot by name with the one shared text encoder: at most 0.03 below before",
            distilled,
            _shift(before, -0.03),
        ),
        least(
            "Report to images of other modalities, shared encoder: at least 0.9 of the experts' "
            "own after stage 1",
            text["distilled"],
            0.9 * text["aligned"] if text["aligned"] is not None else math.inf,
        ),
        least(
            "Report to images of other modalities, shared encoder: at least 0.10 above the "
            "control, stage 2 without stage 1",
            text["distilled"],
            _shift(text["control"], 0.10),
        ),
    ]


def _shift(value: float | None, by: float) -> float:
    # infinity: a threshold that was not measured is never met
    return math.inf if value is None else value + by
