"""Simulated H&E microphotographs, about 2 micrometres a pixel (a 10x objective).

Tissue is three concentration maps, haematoxylin (nuclei), eosin (protein) and brown pigment
(haemosiderin); light is what they let through (Beer-Lambert with stain vectors). Organs: lung
alveoli and kidney cortex, so that "none" has the same organs as the conditions.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Ink, Simulated, smooth_noise
from m3bind.data.phantom.pathology_signs import SIGNS
from m3bind.data.phantom.pathology_slide import SIZE, Slide
from m3bind.data.phantom.patients import Patient

_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
_EOSIN = np.array([0.09, 0.95, 0.26])
_BROWN = np.array([0.30, 0.58, 0.80])


def simulate(p: Patient) -> Simulated:
    """An H&E microphotograph, uint8 RGB [160, 160, 3], and what its report may say."""
    slide = Slide(p.rng("image"))
    SIGNS[p.label](slide, p)
    if slide.organ == "lung" and slide.rng.uniform() < 0.25:
        _soot(slide)
    slide.facts["organ"] = slide.organ
    return Simulated(array=_scan(slide), facts=slide.facts)


def _soot(slide: Slide) -> None:
    """Soot of city air, in anyone."""
    rng = slide.rng
    dust = Ink(SIZE)
    q = rng.uniform(20, 140, 2)
    for o in q + rng.normal(0, 12, (160, 2)):
        i, j = np.clip(o.astype(int), 0, SIZE - 1)
        if slide.eosin[j, i] > 0.4:
            dust.disc(o[0], o[1], rng.uniform(0.5, 1.0))
    slide.soot += dust.array()
    slide.facts["anthracosis"] = True


def _scan(slide: Slide) -> np.ndarray:
    """Stain strength and hue vary between laboratories; then optics, lamp and sensor."""
    rng = slide.rng
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
