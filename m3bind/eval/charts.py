"""The report's charts of a run: few-shot accuracy, losses and validation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3bind.eval.figures import PALETTE, Series, line_chart, title_of
from m3bind.eval.metrics import lookup
from m3bind.tracking import read_history

History = Path | str | Sequence[Mapping[str, Any]]
_BEFORE, _AFTER = "#8C8C8C", "#0072B2"


def few_shot(metrics: Mapping[str, Any]) -> dict[str, Any]:
    stages = [("before", "before", _BEFORE, "5 3"), ("aligned", "after stage 1", _AFTER, "")]
    names = list(lookup(metrics, "few_shot.before") or lookup(metrics, "few_shot.aligned") or {})
    charts = []
    shots: list[str] = []
    for name in names:
        lines = []
        for stage, title, colour, dash in stages:
            values = lookup(metrics, f"few_shot.{stage}.{name}") or {}
            shots = sorted({*shots, *values}, key=int)
            lines.append(
                Series(
                    name=title,
                    x=[int(k) for k in values],
                    y=[v["mean"] for v in values.values()],
                    spread=[v["std"] for v in values.values()],
                    colour=colour,
                    dash=dash,
                    points=True,
                )
            )
        charts.append(
            line_chart(
                lines,
                title="Mean of the modalities" if name == "mean" else title_of(name),
                x_label="examples a condition",
                y_label="balanced accuracy",
                y_range=(0.0, 1.0),
                x_ticks=[int(k) for k in shots],
                log_x=True,
            )
        )
    return {"charts": charts, "names": names, "shots": shots}


def losses(histories: Mapping[str, History]) -> list[str]:
    charts = []
    for title, source in histories.items():
        lines = read_history(source) if isinstance(source, (str, Path)) else list(source)
        judged = [v for v in lines if "validation" in v]
        best = max(judged, key=lambda v: v["validation"]["score"])["step"] if judged else None
        markers = [(best, "kept")] if best is not None else []
        train = [v for v in lines if "loss" in v]
        if train:
            steps = [v["step"] for v in train]
            parts = _parts(train)
            series = [
                Series(name="", x=steps, y=[v["loss"] for v in train], colour="#C9D6E3", width=1),
                Series(name="sum", x=steps, y=_smooth([v["loss"] for v in train]), colour="#333"),
            ]
            if len(parts) > 1:
                series += [
                    Series(name=name, x=steps, y=_smooth(y), colour=colour)
                    for (name, y), colour in zip(parts.items(), PALETTE, strict=False)
                ]
            charts.append(
                line_chart(
                    series,
                    title=f"{title}: loss",
                    x_label="step",
                    y_label="training loss",
                    markers=markers,
                )
            )
        if len(judged) > 1:
            names = list(dict.fromkeys(k for v in judged for k in v["validation"]))
            charts.append(
                line_chart(
                    [
                        Series(
                            name=name.replace("_", " "),
                            x=[v["step"] for v in judged if name in v["validation"]],
                            y=[v["validation"][name] for v in judged if name in v["validation"]],
                            colour="#333" if name == "score" else colour,
                            dash="" if name == "score" else "4 2",
                            points=name == "score",
                        )
                        for name, colour in zip(names[:6], PALETTE, strict=False)
                    ],
                    title=f"{title}: validation",
                    x_label="step",
                    y_label="higher is better",
                    markers=markers,
                )
            )
    return charts


def _parts(train: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The terms of the loss over the steps; "clip/xray", "clip/ct" ... count as one, summed."""
    terms = {name.split("/")[0] for v in train for name in v.get("losses", {})}
    return {
        term: [
            sum(x for name, x in v.get("losses", {}).items() if name.split("/")[0] == term)
            for v in train
        ]
        for term in sorted(terms)
    }


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean whose window is a fifteenth of the curve, shorter at both ends."""
    half = max(1, len(values) // 30)
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
