"""The slide of a simulated microphotograph: stains as maps, nuclei as ink, a mesh of cells."""

from __future__ import annotations

from typing import Any

import numpy as np

from m3bind.data.phantom.canvas import Floats, Ink, smooth_noise

SIZE = 160


class Slide:
    """Concentration maps, with nuclei drawn as ellipses and pasted at the end."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.facts: dict[str, Any] = {}
        self.organ = "lung"
        self.zoom = rng.uniform(0.72, 1.3)
        self.alveolus = rng.uniform(25, 40)  # pixels at zoom 1
        self.eosin = np.zeros((SIZE, SIZE), np.float32)
        self.haze = np.zeros((SIZE, SIZE), np.float32)  # diffuse haematoxylin
        self.brown = np.zeros((SIZE, SIZE), np.float32)
        self.soot = np.zeros((SIZE, SIZE), np.float32)
        self.nuclei = Ink(SIZE)
        axis = np.arange(SIZE, dtype=np.float32)
        self.x, self.y = np.meshgrid(axis, axis)

    def distance(self, cx: float, cy: float, wobble: Floats | None = None) -> Floats:
        """Distance from a point, with an uneven edge if asked."""
        d = np.hypot(self.x - cx, self.y - cy)
        return d if wobble is None else d * (1 + wobble)

    def paint(self, mask: Floats, eosin: float, haze: float = 0.0) -> None:
        """Replace what is there by a material."""
        self.eosin += mask * (eosin - self.eosin)
        self.haze += mask * (haze - self.haze)

    def clear(self, mask: Floats) -> None:
        """Remove tissue and the nuclei within."""
        self.paint(mask, 0.0)
        self.nuclei.erase(mask)

    def nucleus(
        self, x: Any, y: Any, long: float, short: float, angle: Any, dark: float = 0.85
    ) -> None:
        """Ellipses at points x, y [N]."""
        x, y = np.atleast_1d(x), np.atleast_1d(y)
        n = len(x)
        rng = self.rng
        t = np.linspace(0, 2 * np.pi, 9)[:-1]
        a = np.broadcast_to(np.asarray(angle, float), (n,))[:, None]
        size = rng.uniform(0.8, 1.2, (n, 1)) * self.zoom
        ex, ey = size * long * np.cos(t), size * short * np.sin(t)
        px = x[:, None] + ex * np.cos(a) - ey * np.sin(a)
        py = y[:, None] + ex * np.sin(a) + ey * np.cos(a)
        values = np.clip(dark * rng.uniform(0.8, 1.15, n), 0, 1)
        flat = (np.stack([px, py], 2).reshape(n, -1) + 0.5) * self.nuclei.scale
        for q, value in zip(flat.tolist(), values, strict=True):
            self.nuclei.draw.polygon(q, fill=round(255 * value))

    def sprinkle(self, mask: Floats, num: int, long: float, short: float, dark: float) -> None:
        """Nuclei at random places where mask is high."""
        if num <= 0:
            return
        rng = self.rng
        x, y = rng.uniform(0, SIZE - 1, (2, 12 * num))
        good = mask[y.astype(int), x.astype(int)] > rng.uniform(0.3, 1, len(x))
        x, y = x[good][:num], y[good][:num]
        self.nucleus(x, y, long, short, rng.uniform(0, np.pi, len(x)), dark)


def polar(cx: float, cy: float, radius: Any, angle: Any) -> tuple[Any, Any]:
    """Points (x, y) about a centre."""
    return cx + radius * np.cos(angle), cy + radius * np.sin(angle)


def mesh(slide: Slide, spacing: float, warp: float) -> tuple[Floats, Floats, np.ndarray]:
    """A jittered, warped Voronoi mesh: nearest and second distance, and the seeds."""
    rng = slide.rng
    n = int(np.ceil(SIZE / spacing)) + 3
    gx, gy = np.meshgrid(np.arange(n), np.arange(n))
    seeds = np.stack([gx + 0.5 * (gy % 2), gy], 2).reshape(-1, 2) * spacing - 1.3 * spacing
    seeds = seeds + rng.uniform(-0.30, 0.30, seeds.shape) * spacing + rng.uniform(0, spacing, 2)
    # Distances at half resolution are enough: the mesh is smooth.
    axis = np.arange(0, SIZE, 2, dtype=np.float32) + 0.5
    x, y = np.meshgrid(axis, axis)
    half = (SIZE // 2, SIZE // 2)
    x = x + warp * smooth_noise(rng, half, (9, 9))
    y = y + warp * smooth_noise(rng, half, (9, 9))
    first = np.full(half, 1e9, np.float32)
    second = first.copy()
    for sx, sy in seeds:
        d = (x - sx) ** 2 + (y - sy) ** 2
        np.minimum(second, np.maximum(d, first), out=second)
        np.minimum(first, d, out=first)
    return _double(np.sqrt(first)), _double(np.sqrt(second)), seeds


def _double(field: Floats) -> Floats:
    """Half resolution to full, linearly."""
    padded = np.pad(field, ((0, 1), (0, 1)), mode="edge")
    out = np.empty((SIZE, SIZE), np.float32)
    out[::2, ::2] = padded[:-1, :-1]
    out[1::2, ::2] = 0.5 * (padded[:-1, :-1] + padded[1:, :-1])
    out[:, 1::2] = 0.5 * (out[:, ::2] + np.pad(out[:, ::2], ((0, 0), (0, 1)), mode="edge")[:, 1:])
    return out
