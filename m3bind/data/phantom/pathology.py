"""Simulated H&E microphotographs, about 2 micrometres a pixel (a 10x objective).

Tissue is three concentration maps, haematoxylin (nuclei), eosin (protein) and brown pigment
(haemosiderin); light is what they let through (Beer-Lambert with stain vectors). Organs: lung
alveoli and kidney cortex, so that "none" has the same organs as the conditions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Floats, Ink, Simulated, catmull_rom, smooth_noise
from m3bind.data.phantom.patients import Patient

SIZE = 160
_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
_EOSIN = np.array([0.09, 0.95, 0.26])
_BROWN = np.array([0.30, 0.58, 0.80])


class Slide:
    """Concentration maps, with nuclei drawn as ellipses and pasted at the end."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.zoom = rng.uniform(0.72, 1.3)
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


def _cells(slide: Slide, spacing: float, warp: float) -> tuple[Floats, Floats, np.ndarray]:
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


def _lung(slide: Slide, *, spacing: float, broken: float = 0.0, thick: float = 1.0) -> Floats:
    """Alveolar septa with capillaries and nuclei; returns the septum mask."""
    rng = slide.rng
    d1, d2, _ = _cells(slide, spacing * slide.zoom, 3.2)
    width = 2.6 * thick * slide.zoom * rng.uniform(0.9, 1.2)
    septum = np.clip(1.6 - (d2 - d1) / width, 0, 1)
    if broken:
        # Gaps where a smooth field is high leave free ends.
        field = smooth_noise(rng, (SIZE, SIZE), (7, 7))
        cut = np.quantile(field[septum > 0.5], 1 - broken)
        septum = septum * np.clip(1 - (field - cut) * 8, 0, 1)
    slide.paint(septum, rng.uniform(0.5, 0.7), 0.08)
    area = float(septum.sum())
    slide.sprinkle(septum, int(area / 26 / slide.zoom**2), 1.9, 1.1, 0.8)
    red = Ink(SIZE)
    x, y = rng.uniform(0, SIZE - 1, (2, 300))
    for a, b in zip(x, y, strict=True):
        if septum[int(b), int(a)] > 0.7:
            red.disc(a, b, 1.1 * slide.zoom)
    slide.eosin += 0.35 * red.array()
    if rng.uniform() < 0.35:  # a lymphoid aggregate, in anyone
        cx, cy = rng.uniform(15, 145, 2)
        r = rng.uniform(9, 18) * slide.zoom
        d = slide.distance(cx, cy, 0.2 * smooth_noise(rng, (SIZE, SIZE), (6, 6)))
        slide.paint(np.clip(r - d, 0, 1), 0.4, 0.15)
        n = int(0.06 * np.pi * (r / slide.zoom) ** 2)
        q, a = r * np.sqrt(rng.uniform(0, 1, n)), rng.uniform(0, 2 * np.pi, n)
        slide.nucleus(cx + q * np.cos(a), cy + q * np.sin(a), 1.35, 1.3, 0.0, 1.0)
    if rng.uniform() < 0.35:  # a fibrous septum between lobules
        a, o = rng.uniform(0, np.pi), rng.uniform(-50, 50)
        line = (slide.x - 80) * np.cos(a) + (slide.y - 80) * np.sin(a) - o
        half = rng.uniform(5, 13)
        band = np.clip(half - np.abs(line + 4 * smooth_noise(rng, (SIZE, SIZE), (5, 5))), 0, 1)
        slide.paint(band, rng.uniform(0.4, 0.6))
        slide.sprinkle(band, int(band.sum() / 110), 2.6, 0.8, 0.75)
        septum = np.maximum(septum, band)
    if rng.uniform() < 0.5:  # a bronchovascular bundle
        cx, cy = rng.uniform(20, 140, 2)
        _vessel(slide, cx, cy, rng.uniform(9, 14) * slide.zoom, 0.65, onion=False)
    return septum


def _vessel(slide: Slide, cx: float, cy: float, r: float, lumen: float, *, onion: bool) -> None:
    """A small artery in cross-section; onion skin: many layers and hardly any lumen."""
    rng = slide.rng
    wobble = 0.06 * smooth_noise(rng, (SIZE, SIZE), (7, 7))
    d = slide.distance(cx, cy, wobble)
    wall = np.clip(r - d + 0.5, 0, 1)
    slide.clear(np.clip(r + 2 * slide.zoom - d, 0, 1))
    slide.paint(np.clip(r + 2.5 - d, 0, 1), 0.35)
    layers = 0.5 + 0.5 * np.cos(2 * np.pi * d / (3.6 * slide.zoom))
    slide.paint(wall, 0.72)
    if onion:
        slide.eosin += wall * 0.55 * (layers - 0.5)
    hole = np.clip(lumen * r - d + 0.5, 0, 1)
    slide.paint(hole, 0.0)
    inner, outer = lumen * r, r
    for radius in np.arange(inner + 1.2, outer, 3.6 * slide.zoom):
        n = int(2 * np.pi * radius / (9 if onion else 7) / slide.zoom) + 2
        a = rng.uniform(0, 2 * np.pi) + np.arange(n) * 2 * np.pi / n + rng.normal(0, 0.12, n)
        slide.nucleus(
            cx + radius * np.cos(a), cy + radius * np.sin(a), 2.5, 0.75, a + np.pi / 2, 0.8
        )


def _kidney(slide: Slide, *, nodules: int = 0, onion: float = 0.0) -> None:
    """Cortex: packed tubules, one or two glomeruli, an arteriole."""
    rng = slide.rng
    z = slide.zoom
    spacing = 21 * z
    d1, d2, seeds = _cells(slide, spacing, 1.2)
    cell = np.clip((d2 - d1 - 1.6) / 1.2, 0, 1)
    slide.paint(np.ones((SIZE, SIZE), np.float32), 0.22)
    pink = rng.uniform(0.62, 0.8)
    slide.paint(cell, pink, 0.05)
    lumen = rng.uniform(2.2, 3.8) * z
    slide.paint(np.clip(lumen - d1 + 0.5, 0, 1), 0.06)
    for x, y in seeds:
        n = int(rng.integers(5, 9))
        a = rng.uniform(0, 6.28) + np.arange(n) * 2 * np.pi / n + rng.normal(0, 0.15, n)
        q = 0.32 * spacing
        slide.nucleus(x + q * np.cos(a), y + q * np.sin(a), 1.6, 1.5, 0.0, 0.75)
    left = rng.uniform() < 0.5
    places = [(rng.uniform(38, 62) if left else rng.uniform(98, 122), rng.uniform(40, 120))]
    if rng.uniform() < 0.45:
        places.append((places[0][0] + rng.normal(0, 6), (places[0][1] + 80) % 160))
    for x, y in places:
        _glomerulus(slide, x, y, rng.uniform(25, 31) * z, nodules)
    x = 160 - places[0][0] + rng.normal(0, 6)
    y = rng.uniform(35, 125)
    if onion:
        _vessel(slide, x, y, (19 + 5 * onion) * z, 0.22 - 0.10 * onion, onion=True)
        if rng.uniform() < 0.75:
            other = (y + rng.uniform(55, 85)) % 160
            _vessel(slide, x + rng.normal(0, 10), other, 14 * z, 0.2, onion=True)
    else:
        _vessel(slide, x, y, rng.uniform(11, 20) * z, rng.uniform(0.55, 0.68), onion=False)


def _glomerulus(slide: Slide, cx: float, cy: float, r: float, nodules: int) -> None:
    """Bowman's space around a tuft of capillary loops; diabetic nodules are pink and acellular."""
    rng, z = slide.rng, slide.zoom
    wobble = 0.05 * smooth_noise(rng, (SIZE, SIZE), (6, 6))
    d = slide.distance(cx, cy, wobble)
    slide.clear(np.clip(r + 2 - d, 0, 1))
    capsule = np.exp(-(((d - r) / 1.3) ** 2))
    slide.paint(capsule, 0.7)
    tuft = np.clip(0.84 * r - d + 0.5, 0, 1)
    loops = smooth_noise(rng, (SIZE, SIZE), (34, 34))
    slide.paint(tuft, 0.5, 0.05)
    slide.paint(tuft * np.clip(loops * 1.6 - 0.5, 0, 1), 0.08)
    n = int(0.055 * np.pi * (0.84 * r / z) ** 2)
    q, a = 0.8 * r * np.sqrt(rng.uniform(0, 1, n)), rng.uniform(0, 2 * np.pi, n)
    x, y = cx + q * np.cos(a), cy + q * np.sin(a)
    a = rng.uniform(0, 2 * np.pi)
    taken: list[tuple[float, float, float]] = []
    for i in range(nodules):
        size = rng.uniform(6.0, 8.5) * z
        b = a + 2 * np.pi * i / max(nodules, 1)
        o = (0.46 * r + rng.uniform(-2, 2)) if nodules > 1 else 0.2 * r
        taken.append((cx + o * np.cos(b), cy + o * np.sin(b), size))
    free = np.ones(n, bool)
    for nx, ny, size in taken:
        free &= np.hypot(x - nx, y - ny) > size
    free_x, free_y = x[free], y[free]
    slide.nucleus(free_x, free_y, 1.6, 1.35, rng.uniform(0, np.pi, len(free_x)), 0.85)
    for nx, ny, size in taken:
        e = slide.distance(nx, ny)
        slide.paint(np.clip(size - e + 0.5, 0, 1), 0.98)
        m = 12
        b = np.arange(m) * 2 * np.pi / m + rng.normal(0, 0.15, m)
        q = size + 1.0
        slide.nucleus(nx + q * np.cos(b), ny + q * np.sin(b), 1.7, 0.9, b + np.pi / 2, 0.85)


def _gland(slide: Slide, cx: float, cy: float, r: float) -> None:
    """An irregular malignant gland: lumen, tall crowded dark nuclei of uneven size."""
    rng, z = slide.rng, slide.zoom
    k = 9
    angle = np.linspace(0, 2 * np.pi, k, endpoint=False)
    radius = r * rng.uniform(0.7, 1.25, k)
    ring = np.stack([cx + radius * np.cos(angle), cy + radius * np.sin(angle)], 1)
    outer = catmull_rom(ring, closed=True)
    ink = Ink(SIZE)
    ink.polygon(outer)
    slide.clear(ink.array())
    slide.paint(ink.array(), 0.55, 0.22)
    inner = (outer - [cx, cy]) * (0.45 if r > 14 else 0.3) + [cx, cy]
    ink = Ink(SIZE)
    ink.polygon(inner)
    slide.paint(ink.array(), 0.03)
    for f, gap in ((0.86, 3.6), (0.66, 3.9)):
        curve = (catmull_rom(ring, closed=True, steps=12) - [cx, cy]) * f
        length = np.cumsum(np.hypot(*np.diff(curve, axis=0, append=curve[:1]).T))
        at = np.arange(0, length[-1], gap * z)
        i = np.searchsorted(length, at).clip(0, len(curve) - 1)
        q = curve[i] + rng.normal(0, 0.8, (len(i), 2)) + [cx, cy]
        a = np.arctan2(q[:, 1] - cy, q[:, 0] - cx) + rng.normal(0, 0.3, len(i))
        slide.nucleus(q[:, 0], q[:, 1], 3.1, 1.9, a, 1.0)


def _tumour(slide: Slide, s: float, facts: dict[str, Any]) -> None:
    rng, z = slide.rng, slide.zoom
    if rng.uniform() < 0.75:
        _lung(slide, spacing=rng.uniform(25, 40))
        angle = rng.uniform(0, 2 * np.pi)
        side = (slide.x - 80) * np.cos(angle) + (slide.y - 80) * np.sin(angle)
        solid = np.clip(
            (side + rng.uniform(0, 40) + 12 * smooth_noise(rng, (SIZE, SIZE), (5, 5))) / 4, 0, 1
        )
    else:
        solid = np.ones((SIZE, SIZE), np.float32)
    slide.clear(solid)
    fibres = smooth_noise(rng, (SIZE, SIZE), (8, 40) if rng.uniform() < 0.5 else (40, 8))
    slide.eosin += solid * (0.42 + 0.13 * fibres)
    slide.sprinkle(solid, int(solid.sum() / 110), 2.6, 0.8, 0.75)
    places: list[tuple[float, float, float]] = []
    for _ in range(90):
        x, y, r = rng.uniform(8, 152), rng.uniform(8, 152), rng.uniform(10, 20) * z
        apart = all(np.hypot(x - a, y - b) > 0.95 * (r + c) for a, b, c in places)
        if apart and solid[int(y), int(x)] > 0.9:
            places.append((x, y, r))
    for x, y, r in places[: int(2 + 5 * s)]:
        _gland(slide, x, y, r)
    facts["glands"] = len(places[: int(2 + 5 * s)])


def _granulomas(slide: Slide, s: float, facts: dict[str, Any]) -> None:
    rng, z = slide.rng, slide.zoom
    _lung(slide, spacing=rng.uniform(26, 34), thick=1.1)
    places: list[tuple[float, float, float]] = []
    for _ in range(60):
        x, y = rng.uniform(18, 142, 2)
        r = rng.uniform(17, 27) * z
        if all(np.hypot(x - a, y - b) > 0.9 * (r + c) for a, b, c in places):
            places.append((x, y, r))
    places = places[: int(1 + 2.6 * s)]
    giants = 0
    for x, y, r in places:
        d = slide.distance(x, y, 0.10 * smooth_noise(rng, (SIZE, SIZE), (6, 6)))
        slide.clear(np.clip(1.22 * r - d, 0, 1))
        slide.paint(np.clip(1.22 * r - d, 0, 1), 0.45)
        body = np.clip(r - d + 0.5, 0, 1)
        slide.paint(body, 0.62, 0.04)
        slide.eosin += body * 0.08 * smooth_noise(rng, (SIZE, SIZE), (40, 40))
        n = int(0.030 * np.pi * (r / z) ** 2)
        q, a = 0.95 * r * np.sqrt(rng.uniform(0, 1, n)), rng.uniform(0, 2 * np.pi, n)
        turn = a + np.pi / 2 + rng.normal(0, 0.5, n)
        slide.nucleus(x + q * np.cos(a), y + q * np.sin(a), 2.5, 1.1, turn, 0.5)
        n = int(2 * np.pi * r / z * 0.55)
        q, a = r * rng.uniform(1.0, 1.22, n), rng.uniform(0, 2 * np.pi, n)
        slide.nucleus(x + q * np.cos(a), y + q * np.sin(a), 1.35, 1.3, 0.0, 1.0)
        for _ in range(int(rng.integers(1, 3))):
            giants += 1
            b, o = rng.uniform(0, 2 * np.pi), 0.45 * r
            gx, gy, gr = x + o * np.cos(b), y + o * np.sin(b), rng.uniform(6.5, 9) * z
            slide.clear(np.clip(gr - slide.distance(gx, gy), 0, 1))
            slide.paint(np.clip(gr - slide.distance(gx, gy) + 0.5, 0, 1), 0.85)
            b = rng.uniform(0, 6.28) + np.linspace(0, 4.4, 10)  # a horseshoe of nuclei
            slide.nucleus(gx + 0.75 * gr * np.cos(b), gy + 0.75 * gr * np.sin(b), 1.6, 1.2, b, 0.8)
    facts |= {"granulomas": len(places), "giant_cells": giants}


def _macrophages(slide: Slide, septum: Floats, num: int, brown: float) -> None:
    """Round cells in the airspaces, with granules of iron pigment if brown."""
    rng, z = slide.rng, slide.zoom
    x, y = rng.uniform(4, SIZE - 5, (2, 12 * num))
    free = septum[y.astype(int), x.astype(int)] < 0.1
    body, grain = Ink(SIZE), Ink(SIZE)
    for a, b in list(zip(x[free], y[free], strict=True))[:num]:
        r = rng.uniform(3.0, 4.6) * z
        body.disc(a, b, r)
        for o in rng.normal(0, 0.42 * r, (9, 2)):
            grain.disc(a + o[0], b + o[1], rng.uniform(0.6, 1.2) * z)
        slide.nucleus(a + 0.4 * r, b, 1.6, 1.4, 0.0, 0.8)
    slide.eosin = np.maximum(slide.eosin, 0.42 * body.array())
    slide.brown += brown * np.maximum(0.55 * body.array(), grain.array())


def simulate(p: Patient) -> Simulated:
    """An H&E microphotograph, uint8 RGB [160, 160, 3], and what its report may say."""
    rng = p.rng("image")
    s = p.strength
    slide = Slide(rng)
    facts: dict[str, Any] = {}
    organ = "lung"
    spacing = rng.uniform(25, 40)
    if p.label == "heart_failure":
        septum = _lung(slide, spacing=spacing, thick=1.25 + 0.2 * s)
        oedema = np.clip(smooth_noise(rng, (SIZE, SIZE), (4, 4)) * 1.5, 0, 1)
        slide.eosin = np.maximum(slide.eosin, 0.24 * s * oedema)
        num = int(rng.integers(14, 20) + 34 * (s - 0.5))
        _macrophages(slide, septum, num, 0.95)
        facts["macrophages"] = num
    elif p.label == "emphysema":
        septum = _lung(
            slide, spacing=spacing * (1.15 + 0.35 * s), broken=0.20 + 0.14 * s, thick=0.95
        )
        facts["airspace_um"] = round(2 * spacing * (1.15 + 0.35 * s) / 10) * 10
    elif p.label == "lung_tumour":
        _tumour(slide, s, facts)
    elif p.label == "sarcoidosis":
        _granulomas(slide, s, facts)
    elif p.label == "hypertension":
        organ = "kidney"
        _kidney(slide, onion=s)
        facts["lumen_percent"] = round(100 * (0.22 - 0.10 * s))
    elif p.label == "diabetes":
        organ = "kidney"
        facts["nodules"] = int(2 + 2 * round(s * 1.2 - 0.3))
        _kidney(slide, nodules=facts["nodules"])
    elif rng.uniform() < 0.5:
        septum = _lung(slide, spacing=spacing)
        if rng.uniform() < 0.4:
            _macrophages(slide, septum, int(rng.integers(2, 7)), 0.0)
    else:
        organ = "kidney"
        _kidney(slide)
    if organ == "lung" and rng.uniform() < 0.25:  # soot of city air, in anyone
        dust = Ink(SIZE)
        q = rng.uniform(20, 140, 2)
        for o in q + rng.normal(0, 12, (160, 2)):
            i, j = np.clip(o.astype(int), 0, SIZE - 1)
            if slide.eosin[j, i] > 0.4:
                dust.disc(o[0], o[1], rng.uniform(0.5, 1.0))
        slide.soot += dust.array()
        facts["anthracosis"] = True
    facts["organ"] = organ
    return Simulated(array=_scan(slide, rng), facts=facts)


def _scan(slide: Slide, rng: np.random.Generator) -> np.ndarray:
    """Stain strength and hue vary between laboratories; then optics, lamp and sensor."""
    nuclei = slide.nuclei.array()
    chromatin = 1 + 0.15 * smooth_noise(rng, (SIZE, SIZE), (50, 50))
    h = (1.25 * nuclei * chromatin + slide.haze) * rng.uniform(0.6, 1.35)
    texture = 1 + 0.10 * smooth_noise(rng, (SIZE, SIZE), (45, 45))
    e = np.clip(slide.eosin, 0, 2) * texture * (1 - 0.5 * nuclei) * rng.uniform(0.5, 1.4)
    thickness = 1 + rng.uniform(0.04, 0.2) * smooth_noise(rng, (SIZE, SIZE), (3, 3))
    thickness = np.clip(thickness, 0.3, None)
    stains = np.stack([_HAEMATOXYLIN, _EOSIN, _BROWN]) + rng.normal(0, 0.06, (3, 3))
    maps = np.stack([h, e, slide.brown * rng.uniform(0.8, 1.1)], 2) * thickness[..., None]
    od = maps.astype(np.float32) @ np.clip(stains, 0.02, None).astype(np.float32)
    od += 1.1 * slide.soot[..., None]
    od += np.array([0.02, 0.04, 0.03], np.float32) * rng.uniform(0.3, 1.5)
    od = gaussian_filter(od, (rng.uniform(0.35, 0.7),) * 2 + (0,), truncate=2.5)
    lamp = rng.uniform(0.72, 1.0) * (1 + rng.normal(0, 0.04, 3))
    image = np.exp(-od * rng.uniform(0.85, 1.15)) * lamp.astype(np.float32)
    shade = rng.normal(0, 0.05, 2)  # uneven field of the lamp
    image *= (1 + shade[0] * (slide.x / 80 - 1) + shade[1] * (slide.y / 80 - 1))[..., None]
    image += rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0.006, 0.02)
    if rng.uniform() < 0.5:
        image = image[:, ::-1]
    if rng.uniform() < 0.5:
        image = image[::-1]
    return np.ascontiguousarray(np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8))
