"""Drawing tools of the simulators: smooth random fields, splines, antialiased ink."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """What a simulator returns: the examination, and the facts that its report may state."""

    array: NDArray[Any]
    facts: dict[str, Any]
    spacing_mm: tuple[float, float, float] | None = None


@cache
def _spline_matrix(num_out: int, num_in: int) -> Floats:
    """Uniform cubic B-spline interpolation from num_in + 3 control values to num_out samples."""
    position = np.linspace(0, num_in, num_out, endpoint=False)
    base = np.floor(position).astype(int)
    t = position - base
    weights = np.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1
    )
    matrix = np.zeros((num_out, num_in + 3), np.float32)
    for k in range(4):
        matrix[np.arange(num_out), base + k] += weights[:, k] / 6
    return matrix


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, ...], cells: tuple[int, ...]
) -> Floats:
    """A smooth Gaussian field of about unit variance with `cells` waves along each axis."""
    field = rng.standard_normal([c + 3 for c in cells], dtype=np.float32)
    for axis, (n, c) in enumerate(zip(shape, cells, strict=True)):
        field = np.moveaxis(np.tensordot(_spline_matrix(n, c), field, axes=(1, axis)), 0, axis)
    # A B-spline of white noise has variance (151/315)^d: undo it.
    return np.ascontiguousarray(field) * np.float32((315 / 151) ** (len(shape) / 2))


def catmull_rom(points: Any, *, closed: bool = False, steps: int = 6) -> NDArray[np.float64]:
    """A smooth curve through points [N, 2], sampled `steps` times a segment."""
    p = np.asarray(points, float)
    if closed:
        p = np.concatenate([p[-1:], p, p[:2]])
    else:
        p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    curve = 0.5 * (
        2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    )
    curve = curve.reshape(-1, p.shape[1])
    return curve if closed else np.concatenate([curve, p[-2:-1]])


class Ink:
    """A grey canvas of size x size pixels, drawn `scale` times finer for smooth edges.

    Points are in pixels (x, y), centres of pixels at whole numbers.
    """

    def __init__(self, size: int, scale: int = 2) -> None:
        self.size, self.scale = size, scale
        self.image = Image.new("L", (size * scale, size * scale))
        self.draw = ImageDraw.Draw(self.image)

    def _flat(self, points: Any) -> list[float]:
        return ((np.asarray(points, float) + 0.5) * self.scale).ravel().tolist()

    def line(self, points: Any, width: float, value: float = 1.0) -> None:
        """A polyline."""
        w = max(1, round(width * self.scale))
        self.draw.line(self._flat(points), fill=round(255 * value), width=w, joint="curve")

    def taper(self, points: Any, start: float, end: float, value: float = 1.0) -> None:
        """A polyline whose width goes from start to end."""
        p = self._flat(points)
        n = len(p) // 2 - 1
        fill = round(255 * value)
        for i in range(n):
            w = max(1, round((start + (end - start) * i / n) * self.scale))
            self.draw.line(p[2 * i : 2 * i + 4], fill=fill, width=w)
            if w > 2:
                r, x, y = w / 2 - 0.5, p[2 * i + 2], p[2 * i + 3]
                self.draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)

    def polygon(self, points: Any, value: float = 1.0) -> None:
        """A filled polygon."""
        self.draw.polygon(self._flat(points), fill=round(255 * value))

    def disc(self, x: float, y: float, r: float, value: float = 1.0) -> None:
        """A filled disc."""
        s = self.scale
        x, y, r = (x + 0.5) * s, (y + 0.5) * s, r * s
        self.draw.ellipse([x - r, y - r, x + r, y + r], fill=round(255 * value))

    def erase(self, mask: Floats) -> None:
        """Remove ink where mask (size x size, in [0, 1]) is above a half."""
        m = Image.fromarray((np.asarray(mask) > 0.5).astype(np.uint8) * 255)
        m = m.resize(self.image.size, Image.Resampling.NEAREST)
        self.image.paste(0, mask=m)

    def array(self) -> Floats:
        """The canvas as float32 in [0, 1]."""
        small = self.image.reduce(self.scale) if self.scale > 1 else self.image
        return np.asarray(small, np.float32) / 255
