"""What diseases leave on the retina of a simulated fundus: one function each, and one table."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Ink, smooth_noise
from m3bind.data.phantom.patients import Patient
from m3bind.data.phantom.retina_fundus import SIZE, Fundus


def _unit(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


def _occlusion(f: Fundus, p: Patient) -> None:
    """An embolus stops in a temporal artery; the retina that it fed turns pale."""
    rng, arteries = f.rng, f.arteries
    trunks = [i for i, v in enumerate(arteries) if v[2] == 0]
    upper = bool(rng.uniform() < 0.5)
    start = trunks[0] if upper else trunks[2]
    end = trunks[1] if upper else trunks[3]
    path, width, _ = arteries[start]
    k = int(rng.uniform(0.2, 0.4) * len(path))
    beyond = path[k]
    kept = [*arteries[:start], (path[: k + 1], width, 0)]
    f.blocked = [(path[k:], width * 0.8, 0)]
    for v in arteries[start + 1 : end]:
        far = v[0][0][0] < beyond[0]
        (f.blocked if far else kept).append(v)
    f.arteries = kept + arteries[end:]
    # The sector between the arcade and the horizontal raphe, and beyond the arcade.
    q = path[k:]
    inward = np.array([[0, (17 if upper else -17) * f.zoom]])
    ink = Ink(SIZE, 1)
    ink.polygon(np.concatenate([q, q[::-1] + inward]))
    ink.polygon(np.concatenate([q, q[::-1] - 0.65 * inward]))
    mask = gaussian_filter(ink.array(), 4.5)
    mask *= 0.85 + 0.15 * smooth_noise(rng, (SIZE, SIZE), (10, 10))
    f.pale(np.clip(mask * (0.3 + 0.25 * p.strength), 0, 0.75), (0.93, 0.80, 0.60))
    dot = np.exp(-(f.distance2(beyond) / (2.1 * f.zoom) ** 2))
    f.facts["branch"] = "superior temporal" if upper else "inferior temporal"
    f.pale(np.clip(1.6 * dot, 0, 1), (1.0, 0.96, 0.72))


def _pressure(f: Fundus, p: Patient) -> None:
    """Flame haemorrhages along the nerve fibres and cotton wool spots."""
    rng, s, zoom = f.rng, p.strength, f.zoom
    ink = Ink(SIZE)
    flames = int(rng.integers(4, 7) + 8 * (s - 0.6) * 2.5)
    for _ in range(flames):
        a, r = rng.uniform(0, 2 * np.pi), rng.uniform(15, 48) * zoom
        q = f.disc + r * _unit(a)
        for _ in range(6):
            b = a + rng.normal(0, 0.12)
            length = rng.uniform(2.5, 6.5) * zoom
            o = q + rng.normal(0, 1.1, 2)
            e = o + length * _unit(b)
            ink.taper([o, (o + e) / 2, e], 1.5, 0.5)
    f.blood += 0.9 * gaussian_filter(ink.array(), 0.4)
    spots = int(rng.integers(2, 4) + (s > 0.7) + 2 * (s > 0.9))
    wool = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(spots):
        a, r = rng.uniform(0.5 * np.pi, 1.5 * np.pi), rng.uniform(18, 44) * zoom
        for o in f.disc + r * _unit(a) + rng.normal(0, 1.8, (4, 2)):
            wool += 0.5 * np.exp(-(f.distance2(o) / (2.3 * zoom) ** 2))
    f.pale(np.clip(wool, 0, 0.85), (0.97, 0.92, 0.80))
    f.facts |= {"flames": flames, "wool": spots}


def _sugar(f: Fundus, p: Patient) -> None:
    """Microaneurysms, dot and blot haemorrhages, hard exudates around the macula."""
    rng, s, zoom = f.rng, p.strength, f.zoom
    ink = Ink(SIZE)
    dots = int(rng.integers(18, 30) * s)
    for q in f.macula + rng.normal(0, 27 * zoom, (dots, 2)):
        ink.disc(q[0], q[1], rng.uniform(0.5, 1.0), 0.9)
    blots = int(rng.integers(5, 9) * s)
    for q in f.macula + rng.normal(0, 27 * zoom, (blots, 2)):
        ink.disc(q[0], q[1], rng.uniform(1.2, 2.4) * zoom)
    f.blood += ink.array()
    ink = Ink(SIZE)
    for _ in range(int(2 + 3 * s)):
        a, r = rng.uniform(0, 2 * np.pi), rng.uniform(7, 24) * zoom
        q = f.macula + r * _unit(a)
        ring = rng.uniform(3, 6) * zoom  # circinate: around a leaking point
        for b in rng.uniform(0, 2 * np.pi, 10):
            o = q + ring * _unit(b) + rng.normal(0, 0.7, 2)
            ink.disc(o[0], o[1], rng.uniform(0.5, 1.2))
    f.pale(0.9 * ink.array(), (1.0, 0.86, 0.42))
    f.facts |= {"dots": dots, "blots": blots}


def _wax(f: Fundus, p: Patient) -> None:
    """Candle wax sheathing along stretches of veins; snowballs in the inferior vitreous."""
    rng, s, zoom = f.rng, p.strength, f.zoom
    ink = Ink(SIZE)
    stretches = 0
    for path, width, depth in f.veins:
        if depth > 1 or len(path) < 8:
            continue
        for _ in range(int(rng.integers(1, 3)) if depth == 0 else int(rng.uniform() < 0.5 * s)):
            k = int(rng.uniform(0.12, 0.7) * len(path))
            stretches += 1
            for q in path[k : k + int(4 + 5 * s)]:
                o = q + rng.normal(0, 0.6, 2)
                ink.disc(o[0], o[1], width * rng.uniform(0.5, 0.95), rng.uniform(0.7, 1))
    f.pale(0.8 * gaussian_filter(ink.array(), 0.6), (0.97, 0.88, 0.66))
    balls = int(3 + 6 * s)
    for _ in range(balls):
        a, r = rng.uniform(0.15 * np.pi, 0.85 * np.pi), rng.uniform(30, 66) * zoom
        d2 = f.distance2(79.5 + r * _unit(a))
        f.pale(0.75 * np.exp(-((d2 / (2.6 * zoom) ** 2) ** 1.5)), (0.93, 0.90, 0.80))
    f.facts |= {"sheaths": stretches, "snowballs": balls}


def _metastasis(f: Fundus, p: Patient) -> None:
    """A creamy, slightly mottled choroidal plaque with an indistinct edge."""
    rng = f.rng
    a = rng.uniform(0.55 * np.pi, 1.45 * np.pi)
    q = f.centre + rng.uniform(12, 44) * f.zoom * _unit(a)
    radius = (11 + 9 * (p.strength - 0.6) * 2.5 + rng.uniform(0, 3)) * f.zoom
    wobble = 1 + 0.13 * smooth_noise(rng, (SIZE, SIZE), (6, 6))
    stretch = rng.uniform(0.8, 1.25)
    d = np.hypot((f.x - q[0]) * stretch, (f.y - q[1]) / stretch) * wobble
    mask = 1 / (1 + np.exp((d - radius) / 1.5))
    mottle = np.exp(-((smooth_noise(rng, (SIZE, SIZE), (30, 30)) - 1.4) ** 2) / 0.25)
    f.lesion = mask * (1 - 0.45 * mottle)
    f.facts |= {
        "disc_diameters": round(float(2 * radius / (21.5 * f.zoom)), 1),
        "quadrant": ("superior" if q[1] < f.centre[1] else "inferior") + " temporal",
    }


SIGNS = {
    "atrial_fibrillation": _occlusion,
    "hypertension": _pressure,
    "diabetes": _sugar,
    "sarcoidosis": _wax,
    "lung_tumour": _metastasis,
}
