"""What diseases make of the tissue in a simulated microphotograph: a function each, one table."""

from __future__ import annotations

import numpy as np

from m3bind.data.phantom.canvas import Floats, Ink, catmull_rom, smooth_noise
from m3bind.data.phantom.pathology_organs import kidney, lung
from m3bind.data.phantom.pathology_slide import SIZE, Slide, polar
from m3bind.data.phantom.patients import Patient


def _normal(slide: Slide, p: Patient) -> None:
    """Either organ, so that an organ tells no condition."""
    if slide.rng.uniform() < 0.5:
        septum = lung(slide, spacing=slide.alveolus)
        if slide.rng.uniform() < 0.4:
            _macrophages(slide, septum, int(slide.rng.integers(2, 7)), 0.0)
    else:
        kidney(slide)


def _congestion(slide: Slide, p: Patient) -> None:
    """Thick septa, pale fluid in the airspaces, macrophages laden with iron."""
    rng, s = slide.rng, p.strength
    septum = lung(slide, spacing=slide.alveolus, thick=1.25 + 0.2 * s)
    oedema = np.clip(smooth_noise(rng, (SIZE, SIZE), (4, 4)) * 1.5, 0, 1)
    slide.eosin = np.maximum(slide.eosin, 0.24 * s * oedema)
    num = int(rng.integers(14, 20) + 34 * (s - 0.5))
    _macrophages(slide, septum, num, 0.95)
    slide.facts["macrophages"] = num


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


def _destruction(slide: Slide, p: Patient) -> None:
    """Wide airspaces whose septa are broken."""
    spacing = slide.alveolus * (1.15 + 0.35 * p.strength)
    lung(slide, spacing=spacing, broken=0.20 + 0.14 * p.strength, thick=0.95)
    slide.facts["airspace_um"] = round(2 * spacing / 10) * 10


def _tumour(slide: Slide, p: Patient) -> None:
    """Malignant glands in a fibrous stroma, which often meets alveoli."""
    rng, z = slide.rng, slide.zoom
    if rng.uniform() < 0.75:
        lung(slide, spacing=rng.uniform(25, 40))
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
    places = places[: int(2 + 5 * p.strength)]
    for x, y, r in places:
        _gland(slide, x, y, r)
    slide.facts["glands"] = len(places)


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


def _granulomas(slide: Slide, p: Patient) -> None:
    """Round nests of epithelioid cells with giant cells, in a rim of lymphocytes."""
    rng, z = slide.rng, slide.zoom
    lung(slide, spacing=rng.uniform(26, 34), thick=1.1)
    places: list[tuple[float, float, float]] = []
    for _ in range(60):
        x, y = rng.uniform(18, 142, 2)
        r = rng.uniform(17, 27) * z
        if all(np.hypot(x - a, y - b) > 0.9 * (r + c) for a, b, c in places):
            places.append((x, y, r))
    places = places[: int(1 + 2.6 * p.strength)]
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
        slide.nucleus(*polar(x, y, q, a), 2.5, 1.1, turn, 0.5)
        n = int(2 * np.pi * r / z * 0.55)
        q, a = r * rng.uniform(1.0, 1.22, n), rng.uniform(0, 2 * np.pi, n)
        slide.nucleus(*polar(x, y, q, a), 1.35, 1.3, 0.0, 1.0)
        for _ in range(int(rng.integers(1, 3))):
            giants += 1
            gx, gy = polar(x, y, 0.45 * r, rng.uniform(0, 2 * np.pi))
            gr = rng.uniform(6.5, 9) * z
            d = slide.distance(gx, gy)
            slide.clear(np.clip(gr - d, 0, 1))
            slide.paint(np.clip(gr - d + 0.5, 0, 1), 0.85)
            b = rng.uniform(0, 6.28) + np.linspace(0, 4.4, 10)  # a horseshoe of nuclei
            slide.nucleus(*polar(gx, gy, 0.75 * gr, b), 1.6, 1.2, b, 0.8)
    slide.facts |= {"granulomas": len(places), "giant_cells": giants}


def _onion_skin(slide: Slide, p: Patient) -> None:
    """Arteries of the kidney with layered walls and a narrow lumen."""
    kidney(slide, onion=p.strength)
    slide.facts["lumen_percent"] = round(100 * (0.22 - 0.10 * p.strength))


def _nodules(slide: Slide, p: Patient) -> None:
    """Pink acellular nodules in the glomeruli."""
    slide.facts["nodules"] = int(2 + 2 * round(p.strength * 1.2 - 0.3))
    kidney(slide, nodules=slide.facts["nodules"])


SIGNS = {
    "none": _normal,
    "heart_failure": _congestion,
    "emphysema": _destruction,
    "lung_tumour": _tumour,
    "sarcoidosis": _granulomas,
    "hypertension": _onion_skin,
    "diabetes": _nodules,
}
