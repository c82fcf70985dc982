"""Tissue of simulated microphotographs: alveoli of the lung, cortex of the kidney, arteries."""

from __future__ import annotations

import numpy as np

from m3bind.data.phantom.canvas import Floats, Ink, smooth_noise
from m3bind.data.phantom.pathology_slide import SIZE, Slide, mesh, polar


def lung(slide: Slide, *, spacing: float, broken: float = 0.0, thick: float = 1.0) -> Floats:
    """Alveolar septa with capillaries and nuclei; returns the septum mask."""
    rng, z = slide.rng, slide.zoom
    d1, d2, _ = mesh(slide, spacing * z, 3.2)
    width = 2.6 * thick * z * rng.uniform(0.9, 1.2)
    septum = np.clip(1.6 - (d2 - d1) / width, 0, 1)
    if broken:
        # Gaps where a smooth field is high leave free ends.
        field = smooth_noise(rng, (SIZE, SIZE), (7, 7))
        cut = np.quantile(field[septum > 0.5], 1 - broken)
        septum = septum * np.clip(1 - (field - cut) * 8, 0, 1)
    slide.paint(septum, rng.uniform(0.5, 0.7), 0.08)
    area = float(septum.sum())
    slide.sprinkle(septum, int(area / 26 / z**2), 1.9, 1.1, 0.8)
    red = Ink(SIZE)
    x, y = rng.uniform(0, SIZE - 1, (2, 300))
    for a, b in zip(x, y, strict=True):
        if septum[int(b), int(a)] > 0.7:
            red.disc(a, b, 1.1 * z)
    slide.eosin += 0.35 * red.array()
    # In anyone:
    if rng.uniform() < 0.35:
        _lymphoid_aggregate(slide)
    if rng.uniform() < 0.35:
        septum = np.maximum(septum, _lobular_septum(slide))
    if rng.uniform() < 0.5:  # a bronchovascular bundle
        cx, cy = rng.uniform(20, 140, 2)
        _artery(slide, cx, cy, rng.uniform(9, 14) * z, 0.65)
    return septum


def _lymphoid_aggregate(slide: Slide) -> None:
    rng, z = slide.rng, slide.zoom
    cx, cy = rng.uniform(15, 145, 2)
    r = rng.uniform(9, 18) * z
    d = slide.distance(cx, cy, 0.2 * smooth_noise(rng, (SIZE, SIZE), (6, 6)))
    slide.paint(np.clip(r - d, 0, 1), 0.4, 0.15)
    n = int(0.06 * np.pi * (r / z) ** 2)
    q, a = r * np.sqrt(rng.uniform(0, 1, n)), rng.uniform(0, 2 * np.pi, n)
    slide.nucleus(*polar(cx, cy, q, a), 1.35, 1.3, 0.0, 1.0)


def _lobular_septum(slide: Slide) -> Floats:
    """A fibrous septum between lobules; returns its mask."""
    rng = slide.rng
    a, o = rng.uniform(0, np.pi), rng.uniform(-50, 50)
    line = (slide.x - 80) * np.cos(a) + (slide.y - 80) * np.sin(a) - o
    half = rng.uniform(5, 13)
    band = np.clip(half - np.abs(line + 4 * smooth_noise(rng, (SIZE, SIZE), (5, 5))), 0, 1)
    slide.paint(band, rng.uniform(0.4, 0.6))
    slide.sprinkle(band, int(band.sum() / 110), 2.6, 0.8, 0.75)
    return band


def _artery(
    slide: Slide, cx: float, cy: float, r: float, lumen: float, *, onion: bool = False
) -> None:
    """A small artery in cross-section; onion skin: many layers and hardly any lumen."""
    rng, z = slide.rng, slide.zoom
    d = slide.distance(cx, cy, 0.06 * smooth_noise(rng, (SIZE, SIZE), (7, 7)))
    wall = np.clip(r - d + 0.5, 0, 1)
    slide.clear(np.clip(r + 2 * z - d, 0, 1))
    slide.paint(np.clip(r + 2.5 - d, 0, 1), 0.35)
    slide.paint(wall, 0.72)
    if onion:
        layers = 0.5 + 0.5 * np.cos(2 * np.pi * d / (3.6 * z))
        slide.eosin += wall * 0.55 * (layers - 0.5)
    slide.paint(np.clip(lumen * r - d + 0.5, 0, 1), 0.0)
    for radius in np.arange(lumen * r + 1.2, r, 3.6 * z):
        n = int(2 * np.pi * radius / (9 if onion else 7) / z) + 2
        a = rng.uniform(0, 2 * np.pi) + np.arange(n) * 2 * np.pi / n + rng.normal(0, 0.12, n)
        slide.nucleus(*polar(cx, cy, radius, a), 2.5, 0.75, a + np.pi / 2, 0.8)


def kidney(slide: Slide, *, nodules: int = 0, onion: float = 0.0) -> None:
    """Cortex: packed tubules, one or two glomeruli, an arteriole."""
    rng, z = slide.rng, slide.zoom
    slide.organ = "kidney"
    spacing = 21 * z
    d1, d2, seeds = mesh(slide, spacing, 1.2)
    cell = np.clip((d2 - d1 - 1.6) / 1.2, 0, 1)
    slide.paint(np.ones((SIZE, SIZE), np.float32), 0.22)
    pink = rng.uniform(0.62, 0.8)
    slide.paint(cell, pink, 0.05)
    lumen = rng.uniform(2.2, 3.8) * z
    slide.paint(np.clip(lumen - d1 + 0.5, 0, 1), 0.06)
    for x, y in seeds:
        n = int(rng.integers(5, 9))
        a = rng.uniform(0, 6.28) + np.arange(n) * 2 * np.pi / n + rng.normal(0, 0.15, n)
        slide.nucleus(*polar(x, y, 0.32 * spacing, a), 1.6, 1.5, 0.0, 0.75)
    left = rng.uniform() < 0.5
    places = [(rng.uniform(38, 62) if left else rng.uniform(98, 122), rng.uniform(40, 120))]
    if rng.uniform() < 0.45:
        places.append((places[0][0] + rng.normal(0, 6), (places[0][1] + 80) % 160))
    for x, y in places:
        _glomerulus(slide, x, y, rng.uniform(25, 31) * z, nodules)
    x = 160 - places[0][0] + rng.normal(0, 6)
    y = rng.uniform(35, 125)
    if onion:
        _artery(slide, x, y, (19 + 5 * onion) * z, 0.22 - 0.10 * onion, onion=True)
        if rng.uniform() < 0.75:
            other = (y + rng.uniform(55, 85)) % 160
            _artery(slide, x + rng.normal(0, 10), other, 14 * z, 0.2, onion=True)
    else:
        _artery(slide, x, y, rng.uniform(11, 20) * z, rng.uniform(0.55, 0.68))


def _glomerulus(slide: Slide, cx: float, cy: float, r: float, nodules: int) -> None:
    """Bowman's space around a tuft of capillary loops; diabetic nodules are pink and acellular."""
    rng, z = slide.rng, slide.zoom
    d = slide.distance(cx, cy, 0.05 * smooth_noise(rng, (SIZE, SIZE), (6, 6)))
    slide.clear(np.clip(r + 2 - d, 0, 1))
    slide.paint(np.exp(-(((d - r) / 1.3) ** 2)), 0.7)
    tuft = np.clip(0.84 * r - d + 0.5, 0, 1)
    loops = smooth_noise(rng, (SIZE, SIZE), (34, 34))
    slide.paint(tuft, 0.5, 0.05)
    slide.paint(tuft * np.clip(loops * 1.6 - 0.5, 0, 1), 0.08)
    n = int(0.055 * np.pi * (0.84 * r / z) ** 2)
    q, a = 0.8 * r * np.sqrt(rng.uniform(0, 1, n)), rng.uniform(0, 2 * np.pi, n)
    x, y = polar(cx, cy, q, a)
    a = rng.uniform(0, 2 * np.pi)
    taken: list[tuple[float, float, float]] = []
    for i in range(nodules):
        size = rng.uniform(6.0, 8.5) * z
        b = a + 2 * np.pi * i / max(nodules, 1)
        o = (0.46 * r + rng.uniform(-2, 2)) if nodules > 1 else 0.2 * r
        taken.append((*polar(cx, cy, o, b), size))
    free = np.ones(n, bool)
    for nx, ny, size in taken:
        free &= np.hypot(x - nx, y - ny) > size
    slide.nucleus(x[free], y[free], 1.6, 1.35, rng.uniform(0, np.pi, free.sum()), 0.85)
    for nx, ny, size in taken:
        slide.paint(np.clip(size - slide.distance(nx, ny) + 0.5, 0, 1), 0.98)
        b = np.arange(12) * 2 * np.pi / 12 + rng.normal(0, 0.15, 12)
        slide.nucleus(*polar(nx, ny, size + 1.0, b), 1.7, 0.9, b + np.pi / 2, 0.85)
