"""Simulated frontal chest radiographs: summed attenuation of body, bones, heart and vessels.

Body frame: u to the image's right (the patient's left), v down, both about -1..1 over the film;
one unit is about 170 mm. Attenuations add along the ray (Beer-Lambert, log exposure), and the film
curve is applied last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Floats, Ink, Simulated, catmull_rom, smooth_noise
from m3bind.data.phantom.patients import Patient

SIZE = 160
_MM = 170.0


class Film:
    """The film's pose: from body frame to pixels and back, with ink that draws in body frame."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.angle = rng.normal(0, 0.07)
        self.zoom = rng.uniform(0.76, 1.12) * SIZE / 2.2
        self.shift = rng.uniform(-0.2, 0.2, 2)
        c, s = np.cos(self.angle), np.sin(self.angle)
        self.rotation = np.array([[c, -s], [s, c]])
        axis = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
        x, y = np.meshgrid(axis / self.zoom - self.shift[0], axis / self.zoom - self.shift[1])
        self.u = (c * x + s * y).astype(np.float32)
        self.v = (-s * x + c * y).astype(np.float32)

    def pixels(self, points: Any) -> np.ndarray:
        """Body frame [N, 2] to pixels."""
        p = np.asarray(points, float) @ self.rotation.T + self.shift
        return p * self.zoom + (SIZE - 1) / 2

    def area(self, points: Any, soft: float) -> Floats:
        """A filled smooth closed contour, its edge blurred by `soft` pixels."""
        ink = Ink(SIZE)
        ink.polygon(self.pixels(catmull_rom(points, closed=True)))
        return gaussian_filter(ink.array(), soft) if soft else ink.array()

    def ball(self, u: float, v: float, ru: float, rv: float | None = None) -> Floats:
        """Thickness of an ellipsoid along the ray, 1 at its centre."""
        rv = ru if rv is None else rv
        r2 = ((self.u - u) / ru) ** 2 + ((self.v - v) / rv) ** 2
        return np.sqrt(np.clip(1 - r2, 0, 1))


@dataclass(kw_only=True, slots=True)
class Chest:
    """The geometry that conditions change."""

    ctr: float  # cardiothoracic ratio
    width: float = 0.86
    apex: float = -0.86
    dome: float = 0.15  # height of the diaphragm's domes
    base: float = 0.66  # level of the costophrenic angles
    knob: float = 0.085
    unfold: float = 0.0
    atrium: float = 0.0
    carina_deg: float = 62.0
    vessels: float = 1.0
    upper: float = 0.55  # calibre of upper lobe vessels relative to lower


def _chest(p: Patient, rng: np.random.Generator) -> Chest:
    s = p.strength
    c = Chest(ctr=rng.uniform(0.41, 0.495))
    # Depth of breath, build and projection (a bedside film magnifies the heart) vary in everyone.
    c.base += rng.uniform(-0.16, 0.10)
    c.dome *= rng.uniform(0.8, 1.3)
    c.width += rng.uniform(-0.07, 0.05)
    c.ctr += rng.choice([0.0, 0.0, 0.04])
    c.knob *= rng.uniform(0.85, 1.12) * (1 + 0.002 * (p.age - 60))
    c.unfold = rng.uniform(0, 0.18) * (p.age / 70)
    c.carina_deg = rng.uniform(52, 70)
    c.vessels = rng.uniform(0.8, 1.15)
    if p.label == "heart_failure":
        c.ctr = 0.515 + 0.07 * s + rng.uniform(0, 0.04)
        c.upper, c.vessels = 1.15, c.vessels * 1.15
        c.base -= 0.03
    elif p.label == "hypertension":
        c.knob *= 1.25 + 0.4 * s
        c.unfold = 0.6 + 0.55 * s
        c.ctr += rng.uniform(0, 0.02)
    elif p.label == "atrial_fibrillation":
        c.atrium = 0.65 + 0.45 * s
        c.carina_deg = 82 + 26 * s + rng.uniform(-4, 8)
        c.ctr += rng.uniform(0, 0.03)
    elif p.label == "emphysema":
        c.ctr = rng.uniform(0.35, 0.42)
        c.dome *= 0.55 - 0.4 * s
        c.base += 0.05 + 0.03 * s
        c.apex -= 0.03
        c.width += 0.02
        c.vessels *= 0.62 - 0.25 * s
    return c


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


def _ribs(film: Film, c: Chest, p: Patient, rng: np.random.Generator) -> Floats:
    """Ten pairs of posterior ribs and six anterior arcs, as tubes with bright walls."""
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


def _vessels(film: Film, c: Chest, rng: np.random.Generator) -> Floats:
    """Pulmonary vessels: branching lines from each hilum."""
    ink = Ink(SIZE)
    for side in (-1, 1):
        hilum = np.array([0.17 * side, -0.1 + 0.02 * side])
        for angle in np.linspace(-75, 75, 9):
            calibre = c.upper if angle < -12 else 1.0
            heading = np.deg2rad(angle + rng.normal(0, 6))
            _branch(film, ink, rng, hilum, heading, side, 0.030 * calibre * c.vessels, 0)
    return ink.array()


def _branch(
    film: Film,
    ink: Ink,
    rng: np.random.Generator,
    start: np.ndarray,
    heading: float,
    side: int,
    width: float,
    depth: int,
) -> None:
    step = 0.085 if depth == 0 else 0.07
    headings = heading + np.cumsum(rng.normal(0, 0.12, 6))
    path = start + np.cumsum(
        np.stack([side * np.cos(headings), np.sin(headings)], 1) * step, axis=0
    )
    path = np.concatenate([start[None], path])
    px = film.zoom
    value = min(1.0, 0.35 + 14 * width)
    ink.taper(film.pixels(path), width * px, width * 0.45 * px, value)
    if depth < 2 and width > 0.009:
        for i, sign in ((2, -1), (4, 1)):
            turn = sign * rng.uniform(0.4, 0.75)
            _branch(film, ink, rng, path[i], headings[i] + turn, side, width * 0.58, depth + 1)


def _nodule(film: Film, rng: np.random.Generator, u: float, v: float, radius: float) -> Floats:
    """A spiculated mass: a lobulated ball with radial strands."""
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


def simulate(p: Patient) -> Simulated:
    """A frontal chest radiograph, uint8 [160, 160], and what its report may say."""
    rng = p.rng("image")
    film = Film(rng)
    c = _chest(p, rng)
    u, v = film.u, film.v
    s = p.strength
    facts: dict[str, Any] = {"ctr": round(c.ctr, 2)}

    # Lungs as missing attenuation; the thorax is elliptical, so less air towards the sides.
    contours = {side: _lung(c, side) for side in (-1, 1)}
    lungs = {side: film.area(contours[side], 0.6) for side in (-1, 1)}
    lung = np.maximum(lungs[-1], lungs[1])
    depth = np.sqrt(np.clip(1.12 - (u / (c.width + 0.04)) ** 2, 0.05, 1))
    shoulders = 1.0 + 0.16 * np.tanh((v + 0.55) * 8)
    body = np.clip((shoulders - np.abs(u)) / 0.14, 0, 1) ** 0.5
    body = np.maximum(body, np.clip((0.34 - np.abs(u)) / 0.06, 0, 1))
    fat = 1 + 0.22 * p.habitus
    a = 0.62 * fat * body * (0.8 + 0.2 * depth)
    a += 0.10 * np.clip((v - 0.35) / 0.5, 0, 1)
    air = lung * depth * (0.46 + 0.03 * smooth_noise(rng, (SIZE, SIZE), (5, 5)))
    a -= air

    # Mediastinum, spine and airways.
    a += 0.16 * np.exp(-((u / 0.115) ** 4)) * lung_edge(v)
    spine = np.exp(-((u / 0.075) ** 4))
    discs = 1 + 0.35 * np.cos(2 * np.pi * (v / 0.135 + rng.uniform()))
    a += 0.07 * spine * discs
    heart = film.area(_heart(c), 0.9)
    a += 0.26 * heart * (0.75 + 0.25 * film.ball(0.1, 0.25, 0.6, 0.5)) * lung
    carina = -0.23 + rng.normal(0, 0.015)
    half = np.deg2rad(c.carina_deg / 2)
    airway = Ink(SIZE)
    airway.line(film.pixels([(0.005, -1.1), (0.0, carina)]), 0.085 * film.zoom, 1.0)
    for side, stretch in ((-1, 0.9), (1, 1.1)):
        end = (side * 0.27 * np.sin(half) * stretch, carina + 0.27 * np.cos(half))
        airway.line(film.pixels([(0.0, carina), end]), 0.06 * film.zoom, 0.9)
    a -= 0.13 * gaussian_filter(airway.array(), 0.7)

    # Aorta: knob, descending line, and with age or pressure an unfolded, tortuous course.
    knob_u = 0.12 + 0.06 * c.unfold
    a += 0.18 * np.clip(film.ball(knob_u, -0.42 - 0.03 * c.unfold, c.knob * 1.35) * 1.6, 0, 1)
    y = np.linspace(-0.42, c.base, 9)
    x = knob_u + c.knob * 0.9 + 0.10 * c.unfold * np.sin((y + 0.42) / 1.05 * np.pi * 1.3)
    ink = Ink(SIZE)
    shape = np.concatenate([np.stack([x, y], 1), [(0.0, c.base), (0.0, -0.42)]])
    ink.polygon(film.pixels(shape))
    a += (0.09 + 0.07 * min(c.unfold, 1)) * gaussian_filter(ink.array(), 0.8)
    bulge = film.ball(-0.085 - 0.065 * c.unfold, -0.2, 0.09 + 0.02 * c.unfold, 0.22)
    a += 0.13 * np.clip(1.5 * bulge, 0, 1)
    if p.label == "hypertension":
        facts["aorta_mm"] = int(30 + 10 * s + rng.integers(0, 5))

    if c.atrium:
        ball = film.ball(-0.10, 0.14, 0.15 + 0.09 * c.atrium, 0.17 + 0.06 * c.atrium)
        a += 0.13 * np.clip(1.8 * ball, 0, 1)
        facts["carina_deg"] = round(c.carina_deg)

    # Pulmonary vessels and hila.
    vessels = _vessels(film, c, rng)
    a += 0.17 * gaussian_filter(vessels, 0.5) * lung
    for side in (-1, 1):
        a += 0.08 * film.ball(0.16 * side, -0.08 + 0.02 * side, 0.09, 0.15)

    a += _signs(p, rng, film, c, lungs, facts)
    a += 0.11 * _ribs(film, c, p, rng) * rng.uniform(0.7, 1.25)
    a += _bones_outside(film, c, rng)
    if p.sex == "woman":
        breast = 0.07 * rng.uniform(0.3, 1.2)
        for side in (-1, 1):
            a += breast * np.clip(1.6 * film.ball(0.46 * side, 0.38, 0.34, 0.3), 0, 1)
    facts |= _incidental(p, rng, film, a)
    return Simulated(array=_expose(a, film, rng), facts=facts)


def lung_edge(v: Floats) -> Floats:
    """The mediastinum fades into the neck."""
    return np.clip((v + 1.0) / 0.4, 0.4, 1)


def _signs(
    p: Patient,
    rng: np.random.Generator,
    film: Film,
    c: Chest,
    lungs: dict[int, Floats],
    facts: dict[str, Any],
) -> Floats:
    """What a condition adds inside the lungs."""
    u, v, s = film.u, film.v, p.strength
    lung = np.maximum(lungs[-1], lungs[1])
    extra = np.zeros((SIZE, SIZE), np.float32)
    toward = 1 if p.side == "left" else -1
    if p.label == "heart_failure":
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
            extra += 0.26 * fluid * lungs[side]
        haze = np.exp(-(((np.abs(u) - 0.22) / 0.2) ** 2) - ((v + 0.02) / 0.28) ** 2)
        texture = np.clip(1 + 0.6 * smooth_noise(rng, (SIZE, SIZE), (18, 18)), 0, None)
        extra += (0.10 * s * haze * texture + 0.10 * s * ink.array()) * lung
        facts["effusion"] = "small" if s < 0.7 else "moderate" if s < 0.9 else "large"
    elif p.label == "lung_tumour":
        radius = rng.uniform(0.095, 0.115) + 0.10 * (s - 0.6)
        zone = str(rng.choice(["upper", "middle", "lower"], p=[0.5, 0.25, 0.25]))
        y = {"upper": -0.5, "middle": -0.12, "lower": 0.2}[zone] + rng.normal(0, 0.05)
        x = toward * (0.5 + (0.08 if y > -0.3 else -0.04) + rng.normal(0, 0.05))
        extra += 0.38 * _nodule(film, rng, x, y, radius) * np.maximum(lung, 0.25)
        facts |= {"size_mm": round(2 * radius * _MM), "zone": zone}
    elif p.label == "sarcoidosis":
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
        for x0, y0, r in zip(x, rng.normal(-0.15, 0.25, n), rng.uniform(0.5, 1.1, n), strict=True):
            q = film.pixels([(x0, y0)])[0]
            dots.disc(q[0], q[1], r, 0.8)
        extra += 0.13 * dots.array() * lung
        facts["node_mm"] = int(14 + 14 * s + rng.integers(0, 5))
    elif p.label == "emphysema":
        for _ in range(int(1 + 4 * s)):
            x, y = rng.uniform(0.25, 0.7) * rng.choice([-1, 1]), rng.uniform(-0.75, -0.2)
            r = rng.uniform(0.08, 0.16)
            ring = np.abs(np.hypot(u - x, v - y) - r)
            extra += 0.05 * np.exp(-((ring / 0.012) ** 2)) * lung
            extra -= 0.04 * film.ball(x, y, r) * lung
        facts["ribs"] = int(10 + round(s))
    return extra


def _bones_outside(film: Film, c: Chest, rng: np.random.Generator) -> Floats:
    """Clavicles, scapulae and humeral heads."""
    ink = Ink(SIZE)
    tilt = rng.uniform(-0.03, 0.08)
    for side in (-1, 1):
        y = c.apex + 0.2
        line = [(0.10, y + 0.05), (0.3, y + 0.02), (0.55, y - 0.1 - tilt), (0.85, y - 0.12 - tilt)]
        curve = catmull_rom(np.array(line) * (side, 1))
        ink.line(film.pixels(curve), 0.055 * film.zoom, 0.75)
        blade = [(0.82, -0.72), (0.98, -0.6), (0.98, -0.1), (0.9, 0.05), (0.84, -0.3)]
        ink.polygon(film.pixels(np.array(blade) * (side, 1) + (side * tilt, 0)), 0.35)
        q = film.pixels([(side * 1.06, -0.66)])[0]
        ink.disc(q[0], q[1], 0.11 * film.zoom, 0.8)
    return 0.15 * gaussian_filter(ink.array(), 0.6)


def _incidental(p: Patient, rng: np.random.Generator, film: Film, a: Floats) -> dict[str, Any]:
    """Harmless things that any patient may have, drawn into `a`."""
    kind = str(rng.choice(["", "", "granuloma", "electrodes", "scoliosis", "clip"]))
    if kind == "granuloma":
        x, y = rng.uniform(0.3, 0.7) * rng.choice([-1, 1]), rng.uniform(-0.5, 0.3)
        a += 0.22 * np.clip(1.5 * film.ball(x, y, 0.018), 0, 1)
    elif kind == "electrodes":
        for x, y in ((-0.5, -0.3), (0.5, -0.3), (0.55, 0.45)):
            x, y = x + rng.normal(0, 0.05), y + rng.normal(0, 0.05)
            a += 0.2 * np.clip(3 * film.ball(x, y, 0.03), 0, 1)
            path = film.pixels(catmull_rom([(x, y), (x * 1.3, y - 0.1), (x * 1.6, y - 0.9)]))
            ink = Ink(SIZE)
            ink.line(path, 0.8)
            a += 0.10 * ink.array()
    elif kind == "scoliosis":
        a += 0.05 * np.exp(-(((film.u - 0.05 * np.sin(3 * film.v)) / 0.07) ** 4))
    elif kind == "clip":
        ink = Ink(SIZE)
        x, y = rng.uniform(-0.3, 0.3), rng.uniform(0.7, 0.9)
        ink.line(film.pixels([(x, y), (x + 0.05, y + 0.02)]), 1.2)
        a += 0.4 * ink.array()
    return {"incidental": kind}


def _expose(a: Floats, film: Film, rng: np.random.Generator) -> np.ndarray:
    """Scatter, exposure, film curve, noise, collimation and the side marker."""
    # Uneven beam and scatter (heel effect, grid cut-off, folds of skin), then the processing of
    # a digital detector, which flattens broad densities to show detail; then the viewer's window.
    span = float(a.std())
    a = a + span * rng.uniform(0.15, 0.55) * smooth_noise(rng, a.shape, (3, 3))
    heel = rng.normal(0, 0.35, 2) * span
    a = a + heel[0] * film.u + heel[1] * film.v
    a = a - rng.uniform(0.3, 0.85) * gaussian_filter(a, 11, truncate=2.0)
    low, high = np.percentile(a[::4, ::4], [4, 97])
    t = (a - low) / (high - low)
    centre, slope = rng.uniform(0.35, 0.7), rng.uniform(3.0, 5.5)
    image = 1 / (1 + np.exp(-slope * (t - centre)))
    image += rng.normal(0, 0.012, a.shape) * rng.uniform(0.6, 1.8)
    level, span = rng.uniform(0.0, 0.15), rng.uniform(0.7, 0.98)
    image = level + (span - level) * image
    if rng.uniform() < 0.5:
        width = rng.integers(1, 7, 4)
        frame = np.zeros(a.shape, bool)
        frame[width[0] : SIZE - width[1], width[2] : SIZE - width[3]] = True
        image = np.where(frame, image, 0.02)
    if rng.uniform() < 0.7:
        # The marker stands on the patient's left.
        ink = Ink(SIZE)
        x, y = SIZE - rng.uniform(12, 20), rng.uniform(8, 22)
        ink.line([(x, y), (x, y + 6), (x + 4, y + 6)], 1.2)
        image = np.maximum(image, ink.array())
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
