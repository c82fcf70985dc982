"""What diseases do to lungs, nodes and arteries of a simulated CT: a function each, one table."""

from __future__ import annotations

import numpy as np

from m3bind.data.phantom.canvas import smooth_noise
from m3bind.data.phantom.ct_body import SHAPE, Body, soft
from m3bind.data.phantom.patients import Patient


def _congestion(b: Body, p: Patient) -> None:
    """Thick septa, dependent ground glass, effusions; the right one is usually larger."""
    rng, s, x, y, z = b.rng, p.strength, b.x, b.y, b.z
    net = smooth_noise(rng, SHAPE, (9, 19, 19))
    edge = np.exp(-((net / 0.16) ** 2)) * np.clip((z - 60) / 100, 0.3, 1)
    b.hu += b.air * edge * (130 + 150 * s)
    b.hu += b.air * np.clip((y + 10) / 70, 0, 1) * (50 + 80 * s)
    depths = []
    for side in (-1, 1):
        depth = (12 + 16 * s) * (1.0 if side < 0 else rng.uniform(0.65, 1))
        fall = depth * np.clip((z - 95) / 110, 0, 1.15)
        level = b.back - fall - 0.0022 * (np.abs(x) - 70) ** 2
        fluid = soft((y - level) / 4.5) * b.air * (side * x > 0)
        b.blend(fluid, rng.uniform(4, 14))
        depths.append(depth)
    b.facts["effusion_mm"] = round(max(depths))


def _destruction(b: Body, p: Patient) -> None:
    """Holes, more of them in the upper lobes, and bullae with thin walls."""
    rng, s = b.rng, p.strength
    field = smooth_noise(rng, SHAPE, (12, 22, 22)) + np.clip((130 - b.z) / 130, -0.3, 0.7)
    holes = np.clip((field - 0.9 + 0.4 * s) * 4, 0, 1)
    b.blend(holes * b.air, -985)
    for _ in range(int(2 + 4 * s)):
        side = rng.choice([-1, 1])
        q = (side * rng.uniform(45, 100), rng.uniform(-45, 45), rng.uniform(35, 120))
        r = rng.uniform(12, 22)
        b.ellipsoid(q, (r + 4, r + 4, r + 6), -450, b.air)
        b.ellipsoid(q, (r, r, r), -992, b.air)
    b.facts["laa_percent"] = round(100 * float((holes * b.air).sum() / b.air.sum()))


def _tumour(b: Body, p: Patient) -> None:
    """A lobulated mass with spicules on the patient's side."""
    rng = b.rng
    side = 1 if p.side == "left" else -1
    upper = bool(rng.uniform() < 0.6)
    x, y = side * rng.uniform(58, 88), rng.uniform(-30, 38)
    q = np.array([x, y, rng.uniform(70, 110) if upper else rng.uniform(145, 180)])
    r = 11 + 12 * (p.strength - 0.6) * 2.5 + rng.uniform(0, 2.5)
    hu = rng.uniform(30, 70)
    for _ in range(4):
        b.ellipsoid(q + rng.normal(0, 0.25 * r, 3), (r * rng.uniform(0.7, 0.95),) * 3, hu)
    for _ in range(16):
        d = rng.normal(0, 1, 3)
        d /= np.linalg.norm(d)
        for f in (1.1, 1.4, 1.7):
            b.ellipsoid(q + f * r * d, (3.0, 3.0, 4.5), hu - 120 * f, b.lungs)
    b.facts |= {"size_mm": round(2 * r), "lobe": "upper" if upper else "lower"}


def _granulomas(b: Body, p: Patient) -> None:
    """Many fine nodules, and large nodes at both hila and in the mediastinum."""
    rng, s = b.rng, p.strength
    n = int(rng.integers(260, 380) * s)
    side = rng.choice([-1, 1], n)
    q = np.stack([side * rng.uniform(30, 115, n), rng.normal(5, 32, n), rng.normal(112, 34, n)], 1)
    at = np.clip(b.voxels(q), 0, np.array(SHAPE)[:, None] - 1)
    dots = np.zeros(SHAPE, np.float32)
    dots[tuple(at)] = rng.uniform(0.45, 0.9, n)
    b.blend(dots * b.air, 40)
    size = 0.0
    for sgn in (-1, 1):
        for _ in range(6):
            c = (sgn * rng.uniform(32, 54), rng.uniform(-6, 30), rng.uniform(112, 158))
            r = rng.uniform(8, 11) + 5 * s
            size = max(size, r)
            b.ellipsoid(c, (r, r, r), 62)
    for c in ((-22, -2, 84), (-20, 6, 104), (-2, 26, 140), (4, 22, 150), (-24, -14, 100)):
        r = 8 + 5 * s
        b.ellipsoid(c, (r, r, r + 3), 60)
    b.facts["node_mm"] = round(1.4 * size)


SIGNS = {
    "heart_failure": _congestion,
    "emphysema": _destruction,
    "lung_tumour": _tumour,
    "sarcoidosis": _granulomas,
}


def calcify(b: Body, p: Patient) -> None:
    """Coronary and aortic plaques: age gives everyone some, diabetes many in all arteries."""
    rng, s = b.rng, p.strength
    heavy = p.label == "diabetes"
    plaques = 0
    for path in b.coronaries:
        by_age = int(rng.uniform() < (p.age - 45) / 60)
        num = int(rng.integers(4, 6) + 6 * s) if heavy else by_age
        for i in rng.choice(14, size=min(num, 14), replace=False):
            size = rng.uniform(4.0, 5.6) if heavy else rng.uniform(2.6, 3.4)
            b.ellipsoid(path[i], (size, size, size + 3), rng.uniform(700, 1300), b.chest)
            plaques += 1
    b.facts["plaques"] = plaques
    num = {"diabetes": int(3 + 4 * s), "hypertension": int(9 + 9 * s)}.get(p.label, 0)
    if not num and p.age > 62:
        num = int(rng.integers(0, 3))
    for i in rng.integers(0, len(b.aorta), num):
        a = rng.uniform(0, 2 * np.pi)
        q = b.aorta[i] + 0.86 * b.aorta_r * np.array([np.cos(a), np.sin(a), 0])
        b.ellipsoid(q, (3.4, 3.4, 7), rng.uniform(500, 950), b.chest)
