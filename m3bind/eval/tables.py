"""The one table that a run ends with in the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from m3bind.eval.metrics import lookup, targets

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["summary"]

_COLUMNS = ("before", "aligned", "distilled", "control")
_ROWS = (
    ("Retrieval between modalities, mAP", "retrieval.{}.map.mean"),
    ("  its chance", "retrieval.{}.chance.mean"),
    ("  normalised, 0 chance to 1 perfect", "retrieval.{}.normalised.mean"),
    ("Report to images of others, mAP", "text_retrieval.{}.mean"),
    ("Zero-shot by name, bal. accuracy", "zero_shot.{}.name.mean"),
    ("Zero-shot by findings", "zero_shot.{}.findings.mean"),
    ("Few-shot, 1 example a condition", "few_shot.{}.mean.1.mean"),
    ("Few-shot, 16 examples a condition", "few_shot.{}.mean.16.mean"),
    ("Modality gap of the images", "modality_gap.{}.mean"),
)


def summary(metrics: Mapping[str, Any]) -> "Table":
    """A rich table of the means by stage; its caption says which demands are not met."""
    from rich.table import Table

    judged = targets(metrics) if metrics.get("simulated") else []  # demands on the demonstration
    missed = [t for t in judged if not t.met]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} demands on a demonstration are met"]
    lines = lines if judged else []
    lines += [
        f"not met: {t.demand}: " + ("not measured" if t.value is None else f"{t.value:.3f}")
        for t in missed
    ]
    table = Table(
        title="SIMULATED cohort" if metrics.get("simulated") else "Means over the modalities",
        caption="\n".join(lines),
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("before", "stage 1", "stage 2", "control"):
        table.add_column(heading, justify="right")
    for title, path in _ROWS:
        values = [lookup(metrics, path.format(stage)) for stage in _COLUMNS]
        if any(v is not None for v in values):
            table.add_row(title, *("" if v is None else f"{v:.3f}" for v in values))
    return table
