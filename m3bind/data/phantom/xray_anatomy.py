"""What every simulated radiograph shows: body, mediastinum, great vessels, lungs, bones.

Each part adds its attenuation to the film.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Floats, Ink, catmull_rom, smooth_noise
from m3bind.data.phantom.patients import Patient
from m3bind.data.phantom.xray_film import SIZE, Chest, Film


def body(film: Film, p: Patient) -> None:
    """Fat and muscle, with the lungs as missing attenuation; sets the masks of the lungs."""
    u, v, c = film.u, film.v, film.chest
    film.lungs = {side: film.area(_lung(c, side), 0.6) for side in (-1, 1)}
    film.lung = np.maximum(film.lungs[-1], film.lungs[1])
    # The thorax is elliptical, so less air towards the sides.
    depth = np.sqrt(np.clip(1.12 - (u / (c.width + 0.04)) ** 2, 0.05, 1))
    shoulders = 1.0 + 0.16 * np.tanh((v + 0.55) * 8)
    inside = np.clip((shoulders - np.abs(u)) / 0.14, 0, 1) ** 0.5
    inside = np.maximum(inside, np.clip((0.34 - np.abs(u)) / 0.06, 0, 1))
    fat = 1 + 0.22 * p.habitus
    film.a = 0.62 * fat * inside * (0.8 + 0.2 * depth)
    film.a += 0.10 * np.clip((v - 0.35) / 0.5, 0, 1)
    film.a -= film.lung * depth * (0.46 + 0.03 * smooth_noise(film.rng, (SIZE, SIZE), (5, 5)))


def mediastinum(film: Film) -> None:
    """Soft tissue that fades into the neck, spine, heart and airways."""
    rng, c, u, v = film.rng, film.chest, film.u, film.v
    film.a += 0.16 * np.exp(-((u / 0.115) ** 4)) * np.clip((v + 1.0) / 0.4, 0.4, 1)
    spine = np.exp(-((u / 0.075) ** 4))
    film.a += 0.07 * spine * (1 + 0.35 * np.cos(2 * np.pi * (v / 0.135 + rng.uniform())))
    heart = film.area(_heart(c), 0.9)
    film.a += 0.26 * heart * (0.75 + 0.25 * film.ball(0.1, 0.25, 0.6, 0.5)) * film.lung
    carina = -0.23 + rng.normal(0, 0.015)
    half = np.deg2rad(c.carina_deg / 2)
    airway = Ink(SIZE)
    airway.line(film.pixels([(0.005, -1.1), (0.0, carina)]), 0.085 * film.zoom, 1.0)
    for side, stretch in ((-1, 0.9), (1, 1.1)):
        end = (side * 0.27 * np.sin(half) * stretch, carina + 0.27 * np.cos(half))
        airway.line(film.pixels([(0.0, carina), end]), 0.06 * film.zoom, 0.9)
    film.a -= 0.13 * gaussian_filter(airway.array(), 0.7)


def great_vessels(film: Film) -> None:
    """Aorta: knob, descending line, and with age or pressure an unfolded, tortuous course.

    A large left atrium makes a double contour.
    """
    c = film.chest
    knob_u = 0.12 + 0.06 * c.unfold
    knob = film.ball(knob_u, -0.42 - 0.03 * c.unfold, c.knob * 1.35)
    film.a += 0.18 * np.clip(knob * 1.6, 0, 1)
    y = np.linspace(-0.42, c.base, 9)
    x = knob_u + c.knob * 0.9 + 0.10 * c.unfold * np.sin((y + 0.42) / 1.05 * np.pi * 1.3)
    ink = Ink(SIZE)
    shape = np.concatenate([np.stack([x, y], 1), [(0.0, c.base), (0.0, -0.42)]])
    ink.polygon(film.pixels(shape))
    film.a += (0.09 + 0.07 * min(c.unfold, 1)) * gaussian_filter(ink.array(), 0.8)
    bulge = film.ball(-0.085 - 0.065 * c.unfold, -0.2, 0.09 + 0.02 * c.unfold, 0.22)
    film.a += 0.13 * np.clip(1.5 * bulge, 0, 1)
    if c.atrium:
        ball = film.ball(-0.10, 0.14, 0.15 + 0.09 * c.atrium, 0.17 + 0.06 * c.atrium)
        film.a += 0.13 * np.clip(1.8 * ball, 0, 1)


def _lung(c: Chest, side: int) -> np.ndarray:
    """Contour of one lung; side -1 is the patient's right. The left dome stands lower."""
    w = c.width
    base = c.base + (0.03 if side > 0 else 0.0)
    top = base - c.dome
    points = [
        (0.36, c.apex), (0.55, c.apex + 0.12), (0.74 * w / 0.86, -0.42), (w - 0.01, 0.0),
        (w, base - 0.3), (w - 0.01, base - 0.04), (w - 0.04, base), (0.66, top + 0.3 * c.dome),
        (0.42, top), (0.2, top + 0.22 * c.dome), (0.1, top + 0.5 * c.dome),
        (0.09, 0.2), (0.09, -0.2), (0.1, -0.55), (0.17, c.apex + 0.08),
    ]  # fmt: skip
    return np.array(points) * (side, 1)


def _heart(c: Chest) -> np.ndarray:
    """Contour of heart and great vessels below the aortic arch."""
    total = 2 * c.width * c.ctr
    right, left = 0.29 * total, 0.71 * total
    low = c.base - 0.6 * c.dome
    points = [
        (-0.11, -0.28), (-0.12, -0.05), (-right * 0.85, 0.08), (-right, 0.25),
        (-right * 0.86, low - 0.1), (-0.06, low), (0.25, low + 0.05), (left * 0.85, low + 0.03),
        (left, low - 0.12), (left * 0.86, 0.18), (left * 0.56, 0.0),
        (0.17 + 0.1 * c.atrium, -0.08), (0.17 + 0.02 * c.atrium, -0.2), (0.1, -0.3),
    ]  # fmt: skip
    return np.array(points)


def vessels(film: Film) -> None:
    """Pulmonary vessels, branching from each hilum, and the hila."""
    rng, c = film.rng, film.chest
    ink = Ink(SIZE)
    for side in (-1, 1):
        hilum = np.array([0.17 * side, -0.1 + 0.02 * side])
        for angle in np.linspace(-75, 75, 9):
            calibre = c.upper if angle < -12 else 1.0
            heading = np.deg2rad(angle + rng.normal(0, 6))
            _branch(film, ink, hilum, heading, side, 0.030 * calibre * c.vessels, 0)
    film.a += 0.17 * gaussian_filter(ink.array(), 0.5) * film.lung
    for side in (-1, 1):
        film.a += 0.08 * film.ball(0.16 * side, -0.08 + 0.02 * side, 0.09, 0.15)


def _branch(
    film: Film,
    ink: Ink,
    start: np.ndarray,
    heading: float,
    side: int,
    width: float,
    depth: int,
) -> None:
    rng, px = film.rng, film.zoom
    step = 0.085 if depth == 0 else 0.07
    headings = heading + np.cumsum(rng.normal(0, 0.12, 6))
    path = start + np.cumsum(
        np.stack([side * np.cos(headings), np.sin(headings)], 1) * step, axis=0
    )
    path = np.concatenate([start[None], path])
    value = min(1.0, 0.35 + 14 * width)
    ink.taper(film.pixels(path), width * px, width * 0.45 * px, value)
    if depth < 2 and width > 0.009:
        for i, sign in ((2, -1), (4, 1)):
            turn = sign * rng.uniform(0.4, 0.75)
            _branch(film, ink, path[i], headings[i] + turn, side, width * 0.58, depth + 1)


def bones(film: Film) -> None:
    """What of the skeleton lies beside the spine."""
    film.a += 0.11 * _ribs(film) * film.rng.uniform(0.7, 1.25)
    film.a += _shoulders(film)


def _ribs(film: Film) -> Floats:
    """Ten pairs of posterior ribs and six anterior arcs, as tubes with bright walls."""
    rng, c = film.rng, film.chest
    spread = (c.base - c.apex) / 1.52
    first = c.apex + 0.05 + rng.normal(0, 0.01)
    a = np.abs(film.u)[None]
    k = np.arange(10, dtype=np.float32)[:, None, None]
    slope = rng.uniform(0.27, 0.42)
    back = first + 0.152 * spread * k + slope * a**1.6 * (0.55 + 0.09 * k) - 0.10 * a * (k < 3)
    width = 0.030 * rng.uniform(0.9, 1.15)
    d = np.abs(film.v[None] - back) / (1 + 0.35 * a)
    tube = np.clip(1.3 - d / width, 0, 1) * (0.55 + 0.45 * np.clip(d / width, 0, 1) ** 2)
    reach = np.clip(0.36 + 0.16 * (k + 1) ** 0.55 * 1.3, 0, c.width + 0.03)
    tube *= (a > 0.07) * np.clip((reach - a) / 0.03, 0, 1)
    ribs = tube.sum(0)
    k = np.arange(6, dtype=np.float32)[:, None, None]
    front = first + 0.22 + 0.18 * spread * k + 0.23 * np.clip(c.width - a, 0, 1) ** 1.2
    d = np.abs(film.v[None] - front)
    tube = np.clip(1.3 - d / (width * 1.15), 0, 1)
    tube *= np.clip((c.width - a) / 0.02, 0, 1) * np.clip((a - 0.3 - 0.02 * k) / 0.12, 0, 1)
    return ribs + 0.55 * tube.sum(0)


def _shoulders(film: Film) -> Floats:
    """Clavicles, scapulae and humeral heads."""
    ink = Ink(SIZE)
    tilt = film.rng.uniform(-0.03, 0.08)
    for side in (-1, 1):
        y = film.chest.apex + 0.2
        line = [(0.10, y + 0.05), (0.3, y + 0.02), (0.55, y - 0.1 - tilt), (0.85, y - 0.12 - tilt)]
        curve = catmull_rom(np.array(line) * (side, 1))
        ink.line(film.pixels(curve), 0.055 * film.zoom, 0.75)
        blade = [(0.82, -0.72), (0.98, -0.6), (0.98, -0.1), (0.9, 0.05), (0.84, -0.3)]
        ink.polygon(film.pixels(np.array(blade) * (side, 1) + (side * tilt, 0)), 0.35)
        q = film.pixels([(side * 1.06, -0.66)])[0]
        ink.disc(q[0], q[1], 0.11 * film.zoom, 0.8)
    return 0.15 * gaussian_filter(ink.array(), 0.6)
