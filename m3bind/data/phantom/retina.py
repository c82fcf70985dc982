"""Simulated colour fundus photographs: layered reflection of choroid, retina, vessels and disc.

Colours are a base reflectance attenuated by pigments' optical densities (Beer-Lambert), with pale
deposits blended on top.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Floats, Ink, Simulated, smooth_noise
from m3bind.data.phantom.patients import Patient
from m3bind.data.phantom.retina_fundus import SIZE, Fundus, draw, grow_vessels
from m3bind.data.phantom.retina_signs import SIGNS

_ARTERY = np.array([0.10, 0.55, 0.40], np.float32)
_VEIN = np.array([0.26, 0.80, 0.50], np.float32)
_BLOOD = np.array([0.36, 1.10, 0.70], np.float32)
_MELANIN = np.array([0.30, 0.40, 0.45], np.float32)


def simulate(p: Patient) -> Simulated:
    """A fundus photograph, uint8 RGB [160, 160, 3], and what its report may say."""
    rng = p.rng("image")
    f = Fundus(rng)
    f.facts["eye"] = p.side
    base, density = _choroid(f, p)
    grow_vessels(f, p)
    # The nerve fibre layer shines, more in the young: broad pale patches without meaning.
    sheen = np.clip(smooth_noise(rng, (SIZE, SIZE), (6, 6)) - 0.6, 0, 1.5)
    f.pale(sheen * rng.uniform(0.0, 0.32), (0.93, 0.80, 0.60))
    if p.label in SIGNS:
        SIGNS[p.label](f, p)
    if p.label != "lung_tumour" and p.age > 60 and rng.uniform() < 0.4:
        ink = Ink(SIZE)  # a few drusen belong to age
        for q in f.macula + rng.normal(0, 13, (rng.integers(3, 9), 2)):
            ink.disc(q[0], q[1], rng.uniform(0.6, 1.2))
        f.pale(0.35 * gaussian_filter(ink.array(), 0.5), (0.95, 0.75, 0.4))
        f.facts["drusen"] = True

    # Compose: choroid (with a metastasis in it), deposits in the retina, then vessels and blood.
    lesion, over = f.lesion[..., None], f.cover[..., None]
    creamy = np.array([0.98, 0.80, 0.50], np.float32) * (0.75 + 0.25 * base)
    light = base * np.exp(-density[..., None] * _MELANIN)
    light = light * (1 - 0.8 * lesion) + 0.8 * lesion * creamy
    light = _optic_disc(light, f) * (1 - over) + f.spot
    hide = 1.0 if p.label != "sarcoidosis" else 1 - 0.75 * over
    light = light * np.exp(-_vessel_density(f, p) * hide - f.blood[..., None] * _BLOOD)
    image = _photograph(light, f, p)
    if p.side == "left":
        image = image[:, ::-1]
    return Simulated(array=np.ascontiguousarray(image), facts=f.facts)


def _choroid(f: Fundus, p: Patient) -> tuple[Floats, Floats]:
    """Choroid and pigment epithelium: colour [3], and density of pigment, tessellated."""
    rng = f.rng
    base = np.array([0.93, 0.47, 0.20], np.float32) * rng.uniform(0.85, 1.1, 3).astype(np.float32)
    pigment = rng.uniform(0.0, 0.9)
    tess = np.abs(smooth_noise(rng, (SIZE, SIZE), (13, 13)))
    tess = np.exp(-((tess / 0.35) ** 2)) * rng.uniform(0.0, 0.35) * (0.5 + p.age / 120)
    density = pigment + rng.uniform(0.1, 0.4) * smooth_noise(rng, (SIZE, SIZE), (4, 4)) - 0.3 * tess
    r_mac = np.hypot(f.x - f.macula[0], f.y - f.macula[1]) / f.zoom
    density += rng.uniform(0.35, 0.8) * np.exp(-((r_mac / rng.uniform(11, 16)) ** 2))
    return base, density


def _optic_disc(light: Floats, f: Fundus) -> Floats:
    """The optic disc: an orange-yellow ellipse with a pale cup."""
    x, y, r = f.x - f.disc[0], f.y - f.disc[1], f.disc_r
    rim = (1 / (1 + np.exp((np.hypot(x * 1.08, y) - r) / 0.7)))[..., None]
    cup_r = r * f.rng.uniform(0.25, 0.5)
    cup = (1 / (1 + np.exp((np.hypot(x + 1, y) - cup_r) / 0.9)))[..., None]
    colour = np.array([1.0, 0.76, 0.48], np.float32)
    pale = np.array([1.0, 0.92, 0.74], np.float32)
    light = light * (1 - 0.85 * rim) + 0.85 * rim * colour
    return light * (1 - 0.7 * cup) + 0.7 * cup * pale


def _vessel_density(f: Fundus, p: Patient) -> Floats:
    """Optical density of the vessels; arteries shine along their middle."""
    artery, vein = draw(f.arteries), draw(f.veins)
    if p.label == "hypertension":  # stiff arteries nick the veins that they cross
        crossing = np.clip(gaussian_filter(artery * vein, 1.6) * 14, 0, 1)
        vein = vein * (1 - crossing * min(1.0, 0.4 + 0.6 * p.strength))
    density = artery[..., None] * _ARTERY + vein[..., None] * _VEIN
    reflex = draw([(q, w * 0.3, d) for q, w, d in f.arteries if w > 1.4])
    density -= 0.22 * reflex[..., None]
    if f.blocked:
        thread = draw([(q, max(w * 0.55, 0.5), d) for q, w, d in f.blocked])
        density += thread[..., None] * _ARTERY
    return density


def _photograph(light: Floats, f: Fundus, p: Patient) -> np.ndarray:
    """Illumination, haze of the lens, exposure, colour balance, noise and the camera's mask."""
    rng, x, y = f.rng, f.x, f.y
    r2 = f.distance2(rng.normal(0, 22, 2) + 79.5) / 80.0**2
    lamp = 1 - rng.uniform(0.1, 0.5) * r2
    lamp += rng.uniform(0.05, 0.22) * smooth_noise(rng, (SIZE, SIZE), (3, 3))
    haze = rng.uniform(0, 0.10) + 0.002 * max(p.age - 60, 0)
    image = light * lamp[..., None] * (1 - haze) + haze * np.array([0.75, 0.6, 0.45], np.float32)
    if rng.uniform() < 0.2:  # a crescent of stray light
        a = rng.uniform(0, 2 * np.pi)
        edge = ((x - 79.5) * np.cos(a) + (y - 79.5) * np.sin(a)) / 80
        image += 0.35 * np.clip(edge - 0.72, 0, 1)[..., None] * np.array([1, 0.8, 0.9], np.float32)
        f.facts["artefact"] = True
    gain = rng.uniform(0.72, 1.15) * rng.uniform(0.92, 1.08, 3)
    image = np.clip(image * gain, 0, 1.2) ** rng.uniform(0.85, 1.2)
    if rng.uniform() < 0.35:
        image = gaussian_filter(image, (rng.uniform(0.2, 0.5),) * 2 + (0,))
    image = image + rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0.005, 0.02)
    radius = rng.uniform(74, 79)
    inside = np.clip(radius - np.hypot(x - 79.5, y - 79.5), 0, 1)
    if rng.uniform() < 0.3:
        inside *= np.abs(y - 79.5) < rng.uniform(66, 72)
    return np.clip(image * inside[..., None] * 255 + 2, 0, 255).astype(np.uint8)
