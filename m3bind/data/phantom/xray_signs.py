"""What diseases add to the lungs of a simulated radiograph: a function each, one table.

What they do to size and shape of heart, aorta and diaphragm is the geometry of the chest.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Floats, Ink, catmull_rom, smooth_noise
from m3bind.data.phantom.patients import Patient
from m3bind.data.phantom.xray_film import MM, SIZE, Film


def _congestion(film: Film, p: Patient) -> None:
    """Septal lines, effusions, and haze about the hila."""
    rng, s, u, v, c = film.rng, p.strength, film.u, film.v, film.chest
    extra = np.zeros((SIZE, SIZE), np.float32)
    ink = Ink(SIZE)
    for side in (-1, 1):
        for y in c.base - np.arange(0.12, 0.5, 0.04):
            if rng.uniform() < 0.85:
                x = c.width - 0.015 - rng.uniform(0.0, 0.02)
                line = [(side * x, y), (side * (x - rng.uniform(0.1, 0.17)), y + 0.01)]
                ink.line(film.pixels(line), 0.011 * film.zoom, rng.uniform(0.6, 1))
        # Fluid: a meniscus that rises towards the chest wall; right usually more.
        height = (0.06 + 0.12 * s) * (1.0 if side < 0 else rng.uniform(0.6, 1.0))
        rise = np.clip((side * u - 0.25) / 0.6, 0, 1) ** 2
        top = c.base - c.dome * 0.55 - height * (0.15 + rise)
        fluid = 0.5 + 0.5 * np.tanh((v - top) / 0.036)
        extra += 0.26 * fluid * film.lungs[side]
    haze = np.exp(-(((np.abs(u) - 0.22) / 0.2) ** 2) - ((v + 0.02) / 0.28) ** 2)
    texture = np.clip(1 + 0.6 * smooth_noise(rng, (SIZE, SIZE), (18, 18)), 0, None)
    extra += (0.10 * s * haze * texture + 0.10 * s * ink.array()) * film.lung
    film.a += extra
    film.facts["effusion"] = "small" if s < 0.7 else "moderate" if s < 0.9 else "large"


def _tumour(film: Film, p: Patient) -> None:
    """A spiculated mass on the patient's side."""
    rng, s = film.rng, p.strength
    radius = rng.uniform(0.095, 0.115) + 0.10 * (s - 0.6)
    zone = str(rng.choice(["upper", "middle", "lower"], p=[0.5, 0.25, 0.25]))
    y = {"upper": -0.5, "middle": -0.12, "lower": 0.2}[zone] + rng.normal(0, 0.05)
    x = 0.5 + (0.08 if y > -0.3 else -0.04) + rng.normal(0, 0.05)
    x = x if p.side == "left" else -x
    film.a += 0.38 * _mass(film, x, y, radius) * np.maximum(film.lung, 0.25)
    film.facts |= {"size_mm": round(2 * radius * MM), "zone": zone}


def _mass(film: Film, u: float, v: float, radius: float) -> Floats:
    """A lobulated ball with radial strands."""
    rng = film.rng
    ink = Ink(SIZE)
    angle = np.linspace(0, 2 * np.pi, 9, endpoint=False)
    r = radius * rng.uniform(0.75, 1.2, 9)
    body = np.stack([u + r * np.cos(angle), v + r * np.sin(angle)], 1)
    ink.polygon(film.pixels(catmull_rom(body, closed=True)))
    for a in rng.uniform(0, 2 * np.pi, 14):
        length = radius * rng.uniform(1.5, 2.2)
        tip = [(u, v), (u + length * np.cos(a), v + length * np.sin(a))]
        ink.taper(film.pixels(tip), 0.02 * film.zoom, 0.004 * film.zoom, 0.6)
    return gaussian_filter(ink.array(), 0.7)


def _granulomas(film: Film, p: Patient) -> None:
    """Large nodes at both hila and beside the trachea, fine nodules in the lungs."""
    rng, s = film.rng, p.strength
    extra = np.zeros((SIZE, SIZE), np.float32)
    for side in (-1, 1):
        for _ in range(6):
            x = side * rng.uniform(0.17, 0.27 + 0.07 * s)
            y = -0.06 + rng.normal(0, 0.085)
            extra += 0.13 * np.clip(1.7 * film.ball(x, y, rng.uniform(0.06, 0.1)), 0, 1)
    for y in (-0.52, -0.4, -0.3):
        extra += 0.13 * np.clip(1.7 * film.ball(-0.15, y, 0.07 + 0.04 * s, 0.09), 0, 1)
    extra = np.minimum(extra, 0.22)
    n = int(120 * s)
    dots = Ink(SIZE)
    x = rng.uniform(0.15, 0.75, n) * rng.choice([-1, 1], n)
    y = rng.normal(-0.15, 0.25, n)
    for x0, y0, r in zip(x, y, rng.uniform(0.5, 1.1, n), strict=True):
        q = film.pixels([(x0, y0)])[0]
        dots.disc(q[0], q[1], r, 0.8)
    extra += 0.13 * dots.array() * film.lung
    film.a += extra
    film.facts["node_mm"] = int(14 + 14 * s + rng.integers(0, 5))


def _bullae(film: Film, p: Patient) -> None:
    """Thin rings around more air, in the upper lobes."""
    rng, s = film.rng, p.strength
    extra = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(int(1 + 4 * s)):
        x, y = rng.uniform(0.25, 0.7) * rng.choice([-1, 1]), rng.uniform(-0.75, -0.2)
        r = rng.uniform(0.08, 0.16)
        ring = np.abs(np.hypot(film.u - x, film.v - y) - r)
        extra += 0.05 * np.exp(-((ring / 0.012) ** 2)) * film.lung
        extra -= 0.04 * film.ball(x, y, r) * film.lung
    film.a += extra
    film.facts["ribs"] = int(10 + round(s))


SIGNS = {
    "heart_failure": _congestion,
    "lung_tumour": _tumour,
    "sarcoidosis": _granulomas,
    "emphysema": _bullae,
}


def incidental(film: Film) -> None:
    """Harmless things that any patient may have."""
    rng = film.rng
    kind = str(rng.choice(["", "", "granuloma", "electrodes", "scoliosis", "clip"]))
    if kind == "granuloma":
        x, y = rng.uniform(0.3, 0.7) * rng.choice([-1, 1]), rng.uniform(-0.5, 0.3)
        film.a += 0.22 * np.clip(1.5 * film.ball(x, y, 0.018), 0, 1)
    elif kind == "electrodes":
        for x, y in ((-0.5, -0.3), (0.5, -0.3), (0.55, 0.45)):
            x, y = x + rng.normal(0, 0.05), y + rng.normal(0, 0.05)
            film.a += 0.2 * np.clip(3 * film.ball(x, y, 0.03), 0, 1)
            path = film.pixels(catmull_rom([(x, y), (x * 1.3, y - 0.1), (x * 1.6, y - 0.9)]))
            ink = Ink(SIZE)
            ink.line(path, 0.8)
            film.a += 0.10 * ink.array()
    elif kind == "scoliosis":
        film.a += 0.05 * np.exp(-(((film.u - 0.05 * np.sin(3 * film.v)) / 0.07) ** 4))
    elif kind == "clip":
        ink = Ink(SIZE)
        x, y = rng.uniform(-0.3, 0.3), rng.uniform(0.7, 0.9)
        ink.line(film.pixels([(x, y), (x + 0.05, y + 0.02)]), 1.2)
        film.a += 0.4 * ink.array()
    film.facts["incidental"] = kind
