"""Simulated chest CT volumes in Hounsfield units: a body, what is in it, and the scanner."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter1d

from m3bind.data.phantom.canvas import Simulated
from m3bind.data.phantom.ct_anatomy import airways, bones, heart, lungs, thorax
from m3bind.data.phantom.ct_body import SHAPE, Body
from m3bind.data.phantom.ct_signs import SIGNS, calcify
from m3bind.data.phantom.patients import Patient


def simulate(p: Patient) -> Simulated:
    """A chest CT, int16 HU [32, 80, 80], about 9.4 x 4.5 x 4.5 mm, and what its report may say."""
    b = Body(p.rng("image"))
    thorax(b, p)
    bones(b)
    lungs(b, p)
    heart(b, p)
    airways(b)
    b.air = b.lungs * np.clip((-500 - b.hu) / 150 + 1, 0, 1)
    if p.label in SIGNS:
        SIGNS[p.label](b, p)
    calcify(b, p)
    if b.rng.uniform() < 0.2:
        _granuloma(b)
    return Simulated(array=_scan(b, p), facts=b.facts, spacing_mm=b.spacing)


def _granuloma(b: Body) -> None:
    """A calcified scar, in anyone."""
    rng = b.rng
    q = (rng.choice([-1, 1]) * rng.uniform(60, 95), rng.uniform(-30, 40), rng.uniform(80, 180))
    b.ellipsoid(q, (3.2, 3.2, 5), 500, b.lungs)
    b.facts["granuloma"] = True


def _scan(b: Body, p: Patient) -> np.ndarray:
    """The couch below, then the scanner's blur and noise."""
    couch = np.abs(b.y - (b.back + 62 + 22 * (p.habitus + 1) / 2) - 0.0012 * b.x**2)
    b.blend(np.clip(1.3 - couch / 4, 0, 1) * (1 - b.skin) * np.ones(SHAPE, np.float32), -650)
    hu = gaussian_filter1d(b.hu, 0.35, axis=2, truncate=3)
    hu += b.rng.standard_normal(SHAPE, dtype=np.float32) * b.rng.uniform(10, 32)
    return np.clip(np.round(hu), -1024, 3071).astype(np.int16)
