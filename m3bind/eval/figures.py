"""Charts of the report as SVG text: loss curves, few-shot curves, heat maps, embedding maps.

SVG written by hand stays sharp on paper, keeps its labels as text, and weighs a few kilobytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

__all__ = [
    "MARKS",
    "PALETTE",
    "Series",
    "condition_colours",
    "heat_map",
    "line_chart",
    "mark",
    "project",
    "scatter",
    "title_of",
]

# Okabe and Ito's palette, which survives the common colour blindnesses; its yellow is replaced,
# being invisible on white
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4FA3", "#5C4A1F")
_NO_FINDING = "#8C8C8C"
MARKS = ("circle", "square", "triangle", "diamond", "cross", "triangle_down", "plus", "bar")

_NAMES = {
    "xray": "X-ray",
    "ct": "CT",
    "retina": "Retina",
    "ecg": "ECG",
    "pathology": "Pathology",
    "none": "no finding",
}


def title_of(name: str) -> str:
    """A name as people write it: "xray" -> "X-ray", "heart_failure" -> "heart failure"."""
    return _NAMES.get(name, name.replace("_", " "))


def condition_colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label; "none" is grey, so that conditions stand out."""
    conditions = [label for label in labels if label != "none"]
    colours = {c: PALETTE[i % len(PALETTE)] for i, c in enumerate(conditions)}
    return {label: colours.get(label, _NO_FINDING) for label in labels}


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a chart; ``spread`` draws a band of +- that much around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    spread: Sequence[float] = field(default_factory=tuple)
    dash: str = ""
    width: float = 2.0
    points: bool = False


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that cover the range."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (340, 230),
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    log_x: bool = False,
    markers: Sequence[tuple[float, str]] = (),
) -> str:
    """An SVG line chart. ``markers`` are vertical dashed lines (x, text)."""
    width, height = size
    named = [s for s in series if s.name]
    left, right, top, bottom = 48, 12, 46 if len(named) > 1 else 30, 40
    xs = [v for s in series for v in s.x]
    ys = [v for s in series for v in s.y if math.isfinite(v)]
    if not xs or not ys:
        return ""
    low, high = y_range or (min(ys), max(ys))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    if y_range is None:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)

    def warp(v: float) -> float:
        return math.log(max(v, 1e-9)) if log_x else v

    x_low, x_high = warp(min(xs)), warp(max(xs))
    if x_high - x_low < 1e-9:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def px(v: float) -> float:
        return left + (warp(v) - x_low) / (x_high - x_low) * (width - left - right)

    def py(v: float) -> float:
        v = min(max(v, low), high)
        return top + (high - v) / (high - low) * (height - top - bottom)

    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}"><text x="{left}" y="18" class="t">{escape(title)}</text>'
    ]
    for v in _ticks(low, high):
        out.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py(v):.1f}" y2="{py(v):.1f}" class="g"/>'
            f'<text x="{left - 6}" y="{py(v) + 4:.1f}" class="l e">{v:g}</text>'
        )
    if x_ticks is None:
        x_ticks = _ticks(min(xs), max(xs))
    for v in x_ticks:
        out.append(f'<text x="{px(v):.1f}" y="{height - bottom + 16}" class="l m">{v:g}</text>')
    for v, text in markers:
        out.append(
            f'<line x1="{px(v):.1f}" x2="{px(v):.1f}" y1="{top}" y2="{height - bottom}" '
            f'class="k"/><text x="{px(v) - 3:.1f}" y="{height - bottom - 5}" class="l e h">'
            f"{escape(text)}</text>"
        )
    out.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" class="l m">{escape(x_label)}'
        f'</text><text transform="translate(12 {(top + height - bottom) / 2}) rotate(-90)" '
        f'class="l m">{escape(y_label)}</text>'
    )
    for s in series:
        points = [(px(a), py(b)) for a, b in zip(s.x, s.y, strict=True) if math.isfinite(b)]
        if len(s.spread):
            upper = [(px(a), py(b + d)) for a, b, d in zip(s.x, s.y, s.spread, strict=True)]
            lower = [(px(a), py(b - d)) for a, b, d in zip(s.x, s.y, s.spread, strict=True)]
            out.append(
                f'<polygon points="{_points(upper + lower[::-1])}" fill="{s.colour}" '
                'opacity="0.18"/>'
            )
        dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
        out.append(
            f'<polyline points="{_points(points)}" fill="none" stroke="{s.colour}" '
            f'stroke-width="{s.width}"{dash}><title>{escape(s.name)}</title></polyline>'
        )
        if s.points:
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{s.colour}"/>'
                    for a, b in points]  # fmt: skip
    if len(named) > 1:
        keys = "".join(
            f'<tspan dx="{10 if i else 0}" style="fill:{s.colour}">{escape(s.name)}</tspan>'
            for i, s in enumerate(named)
        )
        out.append(f'<text x="{left}" y="35" class="l h b">{keys}</text>')
    return "".join(out) + "</svg>"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def heat_map(
    values: Mapping[str, float],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
) -> str:
    """An HTML table of ``values["row->column"]``, coloured and with the numbers in its cells."""
    head = "".join(f"<th scope=col>{escape(title_of(c))}</th>" for c in columns)
    body = []
    for row in rows:
        cells = []
        for column in columns:
            value = values.get(f"{row}->{column}")
            if value is None:
                cells.append('<td class="none">&ndash;</td>')
                continue
            background, ink = _shade((value - low) / (high - low))
            cells.append(f'<td style="background:{background};color:{ink}">{value:.2f}</td>')
        body.append(f"<tr><th scope=row>{escape(title_of(row))}</th>{''.join(cells)}</tr>")
    mean = values.get("mean")
    foot = f' <span class="mean">mean {mean:.3f}</span>' if mean is not None else ""
    return (
        f'<table class="heat"><caption>{escape(title)}{foot}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _shade(fraction: float) -> tuple[str, str]:
    """White to dark blue, monotone in lightness (readable in grey), and an ink that contrasts."""
    stops = np.array([[250, 251, 253], [190, 214, 236], [86, 148, 200], [18, 72, 132]], float)
    position = min(max(fraction, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(position), len(stops) - 2)
    rgb = stops[i] + (position - i) * (stops[i + 1] - stops[i])
    ink = "#111" if rgb @ [0.299, 0.587, 0.114] > 140 else "#fff"
    return "#" + "".join(f"{round(v):02x}" for v in rgb), ink


def project(
    groups: Sequence[np.ndarray],  # each [N_i, D]
    *,
    seed: int,
) -> list[np.ndarray]:
    """t-SNE (cosine, PCA start, fixed seed) of all groups together, each scaled into [0, 1].

    With too few points for t-SNE (under 12) the first two principal components serve.
    """
    x = np.concatenate(groups).astype(np.float64)
    if len(x) < 12:
        centred = x - x.mean(axis=0)
        flat = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(x) - 1) / 3)
        flat = TSNE(
            metric="cosine", init="pca", perplexity=perplexity, max_iter=500, random_state=seed
        ).fit_transform(x)
    flat = flat - flat.min(axis=0)
    flat = flat / np.maximum(flat.max(axis=0), 1e-9)
    return np.split(flat, np.cumsum([len(g) for g in groups])[:-1])


def mark(shape: str, x: float, y: float, r: float, colour: str, title: str = "") -> str:
    """One SVG mark with a white rim, so that marks that overlap stay apart."""
    note = f"<title>{escape(title)}</title>" if title else ""
    style = f'fill="{colour}" stroke="#fff" stroke-width="0.5"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {style}>{note}</circle>'
    outlines = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        "triangle_down": [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
        "diamond": [(0, -1.35), (1.1, 0), (0, 1.35), (-1.1, 0)],
        "bar": [(-0.45, -1.3), (0.45, -1.3), (0.45, 1.3), (-0.45, 1.3)],
    }
    plus = [
        (-0.4, -1.3), (0.4, -1.3), (0.4, -0.4), (1.3, -0.4), (1.3, 0.4), (0.4, 0.4),
        (0.4, 1.3), (-0.4, 1.3), (-0.4, 0.4), (-1.3, 0.4), (-1.3, -0.4), (-0.4, -0.4),
    ]  # fmt: skip
    half = math.sqrt(0.5)
    outlines["plus"] = plus
    outlines["cross"] = [(half * (a - b), half * (a + b)) for a, b in plus]
    path = _points([(x + r * a, y + r * b) for a, b in outlines[shape]])
    return f'<polygon points="{path}" {style}>{note}</polygon>'


def scatter(
    points: Mapping[str, np.ndarray],  # modality -> [N, 2] in [0, 1]
    labels: Mapping[str, Sequence[str]],
    colours: Mapping[str, str],
    *,
    title: str,
    size: int = 480,
    seed: int = 0,
) -> str:
    """An SVG map: the shape of a mark is its modality, the colour its condition."""
    shapes: dict[str, Any] = dict(
        zip(points, MARKS * (1 + len(points) // len(MARKS)), strict=False)
    )
    marks = []
    for modality, xy in points.items():
        for (x, y), label in zip(xy, labels[modality], strict=True):
            marks.append(
                mark(
                    shapes[modality],
                    14 + float(x) * (size - 28),
                    34 + float(y) * (size - 48),
                    4.2,
                    colours.get(label, _NO_FINDING),
                    f"{title_of(modality)}, {title_of(label) or 'not labelled'}",
                )
            )
    # drawn in random order: no modality may cover the others
    order = np.random.default_rng(seed).permutation(len(marks))
    return (
        f'<svg class="chart map" viewBox="0 0 {size} {size}" role="img" '
        f'aria-label="{escape(title)}">'
        f'<rect x="1" y="24" width="{size - 2}" height="{size - 25}" class="f"/>'
        f'<text x="4" y="17" class="t">{escape(title)}</text>'
        + "".join(marks[i] for i in order)
        + "</svg>"
    )
