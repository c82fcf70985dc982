"""The film of a simulated radiograph: its pose, and the geometry of the chest before it.

Body frame: u to the image's right (the patient's left), v down, both about -1..1 over the film;
one unit is about 170 mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Floats, Ink, catmull_rom
from m3bind.data.phantom.patients import Patient

SIZE = 160
MM = 170.0


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


def make_chest(p: Patient, rng: np.random.Generator) -> Chest:
    """The chest of a patient, with what the condition makes of it."""
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


class Film:
    """The film's pose, from body frame to pixels and back, and what its rays have passed."""

    chest: Chest
    lungs: dict[int, Floats]  # by side; -1 is the patient's right
    lung: Floats  # both
    a: Floats  # attenuation, summed along the rays

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.facts: dict[str, Any] = {}
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
