"""Simulated frontal chest radiographs: summed attenuation of body, bones, heart and vessels.

Attenuations add along the ray (Beer-Lambert, log exposure), and the film curve is applied last.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Ink, Simulated, smooth_noise
from m3bind.data.phantom.patients import Patient
from m3bind.data.phantom.xray_anatomy import body, bones, great_vessels, mediastinum, vessels
from m3bind.data.phantom.xray_film import SIZE, Film, make_chest
from m3bind.data.phantom.xray_signs import SIGNS, incidental


def simulate(p: Patient) -> Simulated:
    """A frontal chest radiograph, uint8 [160, 160], and what its report may say."""
    rng = p.rng("image")
    film = Film(rng)
    film.chest = make_chest(p, rng)
    film.facts["ctr"] = round(film.chest.ctr, 2)
    body(film, p)
    mediastinum(film)
    great_vessels(film)
    if p.label == "hypertension":
        film.facts["aorta_mm"] = int(30 + 10 * p.strength + rng.integers(0, 5))
    if film.chest.atrium:
        film.facts["carina_deg"] = round(film.chest.carina_deg)
    vessels(film)
    if p.label in SIGNS:
        SIGNS[p.label](film, p)
    bones(film)
    if p.sex == "woman":
        breast = 0.07 * rng.uniform(0.3, 1.2)
        for side in (-1, 1):
            film.a += breast * np.clip(1.6 * film.ball(0.46 * side, 0.38, 0.34, 0.3), 0, 1)
    incidental(film)
    return Simulated(array=_expose(film), facts=film.facts)


def _expose(film: Film) -> np.ndarray:
    """Scatter, exposure, film curve, noise, collimation and the side marker."""
    rng, a = film.rng, film.a
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
