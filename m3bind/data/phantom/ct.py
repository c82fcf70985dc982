"""Simulated chest CT volumes in Hounsfield units.

Coordinates in mm: x to the patient's left (the image's right), y to the back, z from head to
feet; the array is [D, H, W] = [z, y, x], int16. Shapes are blended with soft edges of one voxel,
as partial volume does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from m3bind.data.phantom.canvas import Floats, Simulated, smooth_noise
from m3bind.data.phantom.patients import Patient

SHAPE = (32, 80, 80)
_MID = 118.0  # z of the carina


def _soft(inside: Floats) -> Floats:
    """Signed distance (positive inside, in voxels) to coverage in [0, 1]."""
    return np.clip(inside + 0.5, 0, 1)


class Body:
    """The volume, its coordinates, and the shapes that everybody has."""

    def __init__(self, rng: np.random.Generator, habitus: float) -> None:
        zoom = rng.uniform(0.98, 1.28)
        self.spacing = (9.4, round(4.5 * zoom, 3), round(4.5 * zoom, 3))
        self.rng = rng
        dx, dy, dz = rng.uniform(-22, 22), rng.uniform(-24, 24), rng.uniform(-24, 20)
        sz, sy, sx = self.spacing
        self.z = ((np.arange(SHAPE[0], dtype=np.float32) + 0.5) * sz - dz)[:, None, None]
        self.y = ((np.arange(SHAPE[1], dtype=np.float32) - 39.5) * sy - dy)[None, :, None]
        self.x = ((np.arange(SHAPE[2], dtype=np.float32) - 39.5) * sx - dx)[None, None, :]
        tilt = np.float32(rng.normal(0, 0.1))
        self.y, self.x = self.y + tilt * self.x, self.x - tilt * self.y  # [1, H, W]
        self.hu = np.full(SHAPE, -1000, np.float32)
        self.habitus = habitus

    def blend(self, mask: Floats, hu: Any) -> None:
        """Replace by hu where mask is 1."""
        self.hu += mask * (hu - self.hu)

    def _box(self, centre: Any, radius: Any) -> tuple[slice, slice, slice]:
        z, y, x = self.z[:, 0, 0], self.y[0, :, 40], self.x[0, 40, :]
        out = []
        for line, c, r in zip(
            (z, y, x), reversed(list(centre)), reversed(list(radius)), strict=True
        ):
            i = np.searchsorted(line, [c - 1.3 * r - 14, c + 1.3 * r + 14])
            out.append(slice(int(i[0]), int(i[1])))
        return out[0], out[1], out[2]

    def ellipsoid(
        self, centre: Any, radius: Any, hu: float | None, limit: Floats | None = None
    ) -> None:
        """Blend an ellipsoid; centre and radius are (x, y, z) in mm."""
        box = self._box(centre, radius)
        cx, cy, cz = centre
        rx, ry, rz = radius
        r = np.sqrt(
            ((self.x[:, box[1], box[2]] - cx) / rx) ** 2
            + ((self.y[:, box[1], box[2]] - cy) / ry) ** 2
            + ((self.z[box[0]] - cz) / rz) ** 2
        )
        mask = _soft((1 - r) * min(rx, ry) / 4.5)
        if limit is not None:
            mask = mask * limit[box]
        self.hu[box] += mask * (hu - self.hu[box])

    def tube(self, points: Any, radius: Any, hu: float, limit: Floats | None = None) -> None:
        """A chain of balls through points [N, 3]; radius in mm, one or N."""
        points = np.asarray(points, float)
        radii = np.broadcast_to(np.asarray(radius, float), (len(points),))
        for q, r in zip(points, radii, strict=True):
            self.ellipsoid(q, (r, r, max(r, 6.0)), hu, limit)


def _thorax(b: Body, p: Patient, barrel: float, flat: float) -> dict[str, Any]:
    """Skin, fat, muscle, ribs, lungs, diaphragm, abdomen. Returns masks."""
    rng, x, y, z = b.rng, b.x, b.y, b.z
    fat = 10 + 12 * (b.habitus + 1) + rng.uniform(0, 4)
    ax, ay = 128 + rng.normal(0, 7), 84 * barrel + rng.normal(0, 3)
    # The thorax narrows to the apex.
    profile = np.clip(1 - (np.clip(150 - z, 0, None) / 168) ** 2.2, 0.12, 1) ** 0.5
    rib_r = np.sqrt((x / (ax * profile)) ** 2 + (y / (ay * (0.35 + 0.65 * profile))) ** 2)
    wide = 0.86 + 0.14 * profile
    body_r = np.sqrt(
        (np.abs(x) / (ax * wide + 30 + fat)) ** 2.4 + (np.abs(y) / (ay + 26 + fat)) ** 2.4
    )
    skin = _soft((1 - body_r) * 30)
    b.blend(skin, -105 + rng.normal(0, 4))
    muscle_r = np.sqrt((np.abs(x) / (ax * wide + 28)) ** 2.3 + (np.abs(y) / (ay + 21)) ** 2.3)
    b.blend(_soft((1 - muscle_r) * 28), 52)
    b.blend(_soft((1 - rib_r * 0.955) * 24), 52)

    # Ribs slope down to the front: a shell cut by oblique planes.
    phase = (z + 0.45 * -y * 1.0 + 0.12 * np.abs(x)) / 24.5 + rng.uniform()
    stripe = np.clip(0.75 - np.abs(phase - np.round(phase)) * 2.9, 0, 0.5) * 2
    shell = np.clip(1.4 - np.abs(rib_r - 1.055) * 17, 0, 1)
    ribs = stripe * shell * (np.abs(x) > 18)
    b.blend(ribs * (y > -ay * 0.86), rng.uniform(330, 480))
    chest = _soft((1 - rib_r) * 25)

    # Two domes; the right one stands higher.
    top_r, top_l = 205 + 22 * flat + rng.normal(0, 5), 213 + 22 * flat + rng.normal(0, 5)
    curve = 48 * (1 - 0.75 * flat)
    dome = np.where(x < 0, top_r, top_l) + curve * (
        ((np.abs(x) - 62) / 75) ** 2 + np.clip((y - 5) / 78, -0.4, None) ** 2
    )
    above = _soft((dome - z) / 9.4)
    b.ellipsoid((-40, -5, 290), (118, 88, 95), 60 + 40 * rng.uniform())
    below = chest * (1 - above)
    enhanced = rng.uniform(50, 115)
    b.blend(below * (x < 25), enhanced)
    b.blend(below * (x >= 25), -95)
    b.ellipsoid((75, 35, 262), (38, 40, 45), enhanced + 8, chest)
    b.ellipsoid((45, -25, 262), (36, 38, 38), 30, chest)
    b.ellipsoid((48, -42, 258), (24, 18, 26), -900, chest)

    # Mediastinum between the lungs, wider in front of the spine and around the heart.
    half = 21 + 13 * np.exp(-(((y - 50) / 30) ** 2)) + 4 * np.clip((z - 150) / 60, 0, 1)
    half = half - 12 * np.exp(-(((y + 70) / 26) ** 2))
    lungs = chest * above * _soft((np.abs(x) - half) / 4.5)
    side = np.sign(x + 0 * z)
    return {"lungs": lungs, "chest": chest, "side": side, "ax": ax, "ay": ay, "skin": skin}


def _bones(b: Body, ay: float) -> None:
    rng, x, y, z = b.rng, b.x, b.y, b.z
    cy = ay - 8
    d = np.sqrt((x / 17) ** 2 + ((y - cy) / 14) ** 2)
    vertebra = _soft((1 - d) * 3.5)
    disc = np.clip(np.cos(2 * np.pi * (z / 23.0 + rng.uniform())) * 3 - 1.9, 0, 1)
    b.blend(vertebra * (1 - disc), 190 + 60 * rng.uniform())
    b.blend(np.clip(1 - np.abs(d - 0.95) * 5, 0, 1) * (1 - disc) * 0.8, 520)
    b.blend(vertebra * disc, 85)
    canal = np.sqrt((x / 8) ** 2 + ((y - cy - 20) / 7) ** 2)
    b.blend(np.clip(1 - np.abs(canal - 1.45) * 2.2, 0, 1) * (1 - 0.6 * disc), 420)
    b.blend(_soft((1 - canal) * 1.6), 25)
    spinous = (np.abs(x) < 4) & (y > cy + 28) & (y < cy + 45)
    b.blend(spinous * (1 - disc) * 0.8, 330)
    for s in (-1, 1):  # scapulae
        t = np.abs((y - cy + 10) - 0.5 * (np.abs(x) - 95)) / 5
        blade = (
            np.clip(1.4 - t, 0, 1) * ((s * x > 68) & (s * x < 128)) * np.clip((150 - z) / 20, 0, 1)
        )
        b.blend(blade * 0.8, 300)
    sternum = np.sqrt((x / 17) ** 2 + ((y + ay + 9) / 6.5) ** 2)
    b.blend(_soft((1 - sternum) * 1.5) * np.clip((z - 60) / 10, 0, 1) * (z < 225), 240)


def _heart(b: Body, p: Patient, facts: dict[str, Any], chest: Floats) -> dict[str, Any]:
    """Heart chambers and great vessels; returns places where calcium lies."""
    rng, s = b.rng, p.strength
    grow = rng.uniform(0.9, 1.12)
    wall = rng.uniform(8.5, 10.5)
    aorta = rng.uniform(13.5, 16) + 0.04 * (p.age - 60)
    if p.label == "heart_failure":
        grow = 1.08 + 0.12 * s
        wall *= 0.9
    elif p.label == "hypertension":
        wall = 14.5 + 7 * s + rng.uniform(0, 1.5)
        aorta = 18.0 + 4.5 * s + rng.uniform(0, 1.5)
        grow *= 1.03
    contrast = rng.uniform(140, 380)
    facts |= {"wall_mm": round(wall), "aorta_mm": round(2 * aorta), "contrast_hu": round(contrast)}
    muscle = rng.uniform(85, 115)
    cx, cy, cz = 14 + 6 * (grow - 1) * 10, -22, 180
    fat = -60
    b.ellipsoid((cx, cy, cz), (60 * grow, 50 * grow, 52 * grow), fat, chest)
    b.ellipsoid((cx, cy, cz), (56 * grow, 46 * grow, 48 * grow), muscle, chest)
    # Right heart in front, left ventricle to the left and back, left atrium behind.
    b.ellipsoid((cx - 30 * grow, cy - 8, cz), (21 * grow, 26 * grow, 34 * grow), contrast - 25)
    b.ellipsoid((cx - 2, cy - 25 * grow, cz + 4), (28 * grow, 15 * grow, 32 * grow), contrast - 25)
    lv = (cx + 24 * grow, cy + 6, cz + 8)
    outer = np.array([30.0, 27.0, 37.0]) * grow + (3 if p.label == "hypertension" else 0)
    b.ellipsoid(lv, outer, muscle)
    b.ellipsoid(lv, outer - wall, contrast)
    b.ellipsoid((cx - 4, cy + 33 * grow, cz - 24), (27 * grow, 15 * grow, 20 * grow), contrast)

    # Aorta: root, ascending, arch over the left bronchus, descending beside the spine.
    t = np.linspace(0, np.pi, 12)
    arch = np.stack(
        [-14 + 20 * (1 - np.cos(t)), -22 + 36 * (1 - np.cos(t)), 102 - 30 * np.sin(t)], 1
    )
    arch[:, 0] = np.linspace(-16, 24, 12)
    up = np.stack([np.linspace(-2, -16, 7), np.full(7, -24), np.linspace(160, 102, 7)], 1)
    bend = 5 + (9 * s if p.label == "hypertension" else 0)
    zd = np.linspace(102, 292, 22)
    down = np.stack([24 + bend * np.sin((zd - 100) / 45), np.full(22, 50.0), zd], 1)
    b.tube(up, aorta, contrast, chest)
    b.tube(arch, aorta * 0.92, contrast, chest)
    b.tube(down, aorta * 0.85, contrast - 10, chest)
    # Pulmonary trunk and its two arteries, superior vena cava.
    trunk = [(6, -28, 142), (8, -14, 132), (4, 2, 128)]
    b.tube(trunk, 14, contrast - 15, chest)
    b.tube([(-10, 6, 128), (-26, 8, 130), (-42, 8, 134)], 10, contrast - 15, chest)
    b.tube([(18, 10, 124), (32, 16, 124), (44, 18, 128)], 10, contrast - 15, chest)
    vena = np.stack([np.full(10, -30.0), np.full(10, -14.0), np.linspace(60, 150, 10)], 1)
    b.tube(vena, 8.5, contrast + rng.uniform(-60, 60), chest)
    return {"cx": cx, "cy": cy, "cz": cz, "grow": grow, "aorta": aorta, "arch": arch, "down": down}


def _airways(b: Body) -> None:
    z = np.linspace(-5, _MID, 18)
    trachea = np.stack([np.zeros(18), 2 + 0.10 * z, z], 1)
    b.tube(trachea, 9.5, -995)
    for side, steep in ((-1, 1.0), (1, 0.8)):
        t = np.linspace(0, 1, 8)
        path = np.stack([side * 46 * t, 14 + 6 * t, _MID + 34 * steep * t], 1)
        b.tube(path, 7 - 1.5 * t, -990)


def _vessel_tree(b: Body, lungs: Floats, amount: float) -> None:
    """Pulmonary vessels: many tapering paths from the hila, drawn as points and blurred."""
    rng = b.rng
    paths, steps = 46, 26
    side = np.repeat([-1.0, 1.0], paths // 2)
    direction = rng.normal(0, 1, (paths, 3)) * [0.7, 0.9, 1.0]
    direction[:, 0] = np.abs(direction[:, 0]) * side + 0.35 * side
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    start = np.stack([38 * side, np.full(paths, 10.0), np.full(paths, 135.0)], 1)
    walk = direction[:, None] + np.cumsum(rng.normal(0, 0.13, (paths, steps, 3)), axis=1)
    points = start[:, None] + np.cumsum(walk * rng.uniform(3.5, 5.0, (paths, 1, 1)), axis=1)
    # Side branches from the middle of each.
    k = rng.integers(5, 14, (paths, 4))
    origin = np.take_along_axis(points, k[:, :, None], axis=1).reshape(-1, 3)
    turn = rng.normal(0, 0.7, (paths * 4, 3)) + np.repeat(direction, 4, 0)
    turn /= np.linalg.norm(turn, axis=1, keepdims=True)
    walk = turn[:, None] + np.cumsum(rng.normal(0, 0.15, (paths * 4, 14, 3)), axis=1)
    side_points = origin[:, None] + np.cumsum(walk * 4.2, axis=1)
    radius = 3.2 * np.linspace(1, 0.35, steps) * rng.uniform(0.7, 1.15, (paths, 1))
    thin = 1.7 * np.linspace(1, 0.3, 14) * np.ones((paths * 4, 1))
    q = np.concatenate([points.reshape(-1, 3), side_points.reshape(-1, 3)])
    # A vessel thinner than a voxel covers part of it.
    weight = np.clip((np.concatenate([radius.ravel(), thin.ravel()]) / 2.9) ** 1.5, 0, 1)
    sz, sy, sx = b.spacing
    i = np.round((q[:, 2] - b.z[0, 0, 0]) / sz).astype(int)
    j = np.round((q[:, 1] - b.y[0, 0, 40]) / sy).astype(int)
    k2 = np.round((q[:, 0] - b.x[0, 40, 0]) / sx).astype(int)
    ok = (i >= 0) & (i < SHAPE[0]) & (j >= 0) & (j < SHAPE[1]) & (k2 >= 0) & (k2 < SHAPE[2])
    field = np.zeros(SHAPE, np.float32)
    np.maximum.at(field, (i[ok], j[ok], k2[ok]), weight[ok])
    field = gaussian_filter(field, (0.25, 0.45, 0.45), truncate=2.5) * 1.9
    b.blend(np.clip(field * amount, 0, 1) * lungs, 60)


def _calcium(
    b: Body, p: Patient, heart: dict[str, Any], facts: dict[str, Any], chest: Floats
) -> None:
    """Coronary and aortic plaques: age gives everyone some, diabetes many in all arteries."""
    rng, s = b.rng, p.strength
    cx, cy, g = heart["cx"], heart["cy"], heart["grow"]
    t = np.linspace(0, 1, 14)[:, None]

    def arc(*q: Any) -> np.ndarray:
        a, m, e = (np.array(v, float) for v in q)
        return (1 - t) ** 2 * a + 2 * t * (1 - t) * m + t**2 * e

    lad = arc(
        (cx + 6, cy - 22 * g, 142), (cx + 34 * g, cy - 44 * g, 165), (cx + 38 * g, cy - 28 * g, 208)
    )
    lcx = arc((cx + 10, cy - 4, 142), (cx + 52 * g, cy - 2, 152), (cx + 46 * g, cy + 30 * g, 190))
    rca = arc(
        (cx - 16, cy - 22 * g, 150), (cx - 62 * g, cy - 36 * g, 175), (cx - 30 * g, cy + 8, 218)
    )
    heavy = p.label == "diabetes"
    plaques = 0
    for path in (lad, lcx, rca):
        by_age = int(rng.uniform() < (p.age - 45) / 60)
        num = int(rng.integers(4, 6) + 6 * s) if heavy else by_age
        for i in rng.choice(14, size=min(num, 14), replace=False):
            size = rng.uniform(4.0, 5.6) if heavy else rng.uniform(2.6, 3.4)
            b.ellipsoid(path[i], (size, size, size + 3), rng.uniform(700, 1300), chest)
            plaques += 1
    facts["plaques"] = plaques
    wall = heart["aorta"]
    where = np.concatenate([heart["arch"], heart["down"]])
    num = {"diabetes": int(3 + 4 * s), "hypertension": int(9 + 9 * s)}.get(p.label, 0)
    if not num and p.age > 62:
        num = int(rng.integers(0, 3))
    for i in rng.integers(0, len(where), num):
        a = rng.uniform(0, 2 * np.pi)
        q = where[i] + 0.86 * wall * np.array([np.cos(a), np.sin(a), 0])
        b.ellipsoid(q, (3.4, 3.4, 7), rng.uniform(500, 950), chest)


def _signs(b: Body, p: Patient, lungs: Floats, ay: float, facts: dict[str, Any]) -> None:
    """What a condition does in lungs and nodes."""
    rng, s, x, y, z = b.rng, p.strength, b.x, b.y, b.z
    if p.label == "heart_failure":
        net = smooth_noise(rng, SHAPE, (9, 19, 19))
        edge = np.exp(-((net / 0.16) ** 2)) * np.clip((z - 60) / 100, 0.3, 1)
        b.hu += lungs * edge * (130 + 150 * s)
        b.hu += lungs * np.clip((y + 10) / 70, 0, 1) * (50 + 80 * s)
        depth = {}
        for side in (-1, 1):
            depth[side] = (12 + 16 * s) * (1.0 if side < 0 else rng.uniform(0.65, 1))
            level = (
                ay
                - depth[side] * np.clip((z - 95) / 110, 0, 1.15)
                + 0.0022 * (np.abs(x) - 70) ** 2 * -1
            )
            fluid = _soft((y - level) / 4.5) * lungs * (side * x > 0)
            b.blend(fluid, rng.uniform(4, 14))
        facts["effusion_mm"] = round(max(depth.values()))
    elif p.label == "emphysema":
        field = smooth_noise(rng, SHAPE, (12, 22, 22)) + np.clip((130 - z) / 130, -0.3, 0.7)
        holes = np.clip((field - 0.9 + 0.4 * s) * 4, 0, 1)
        b.blend(holes * lungs, -985)
        for _ in range(int(2 + 4 * s)):
            side = rng.choice([-1, 1])
            q = (side * rng.uniform(45, 100), rng.uniform(-45, 45), rng.uniform(35, 120))
            r = rng.uniform(12, 22)
            b.ellipsoid(q, (r + 4, r + 4, r + 6), -450, lungs)
            b.ellipsoid(q, (r, r, r), -992, lungs)
        facts["laa_percent"] = round(100 * float((holes * lungs).sum() / lungs.sum()))
    elif p.label == "lung_tumour":
        side = 1 if p.side == "left" else -1
        upper = bool(rng.uniform() < 0.6)
        q = np.array(
            [
                side * rng.uniform(58, 88),
                rng.uniform(-30, 38),
                rng.uniform(70, 110) if upper else rng.uniform(145, 180),
            ]
        )
        r = 11 + 12 * (s - 0.6) * 2.5 + rng.uniform(0, 2.5)
        hu = rng.uniform(30, 70)
        for _ in range(4):
            b.ellipsoid(q + rng.normal(0, 0.25 * r, 3), (r * rng.uniform(0.7, 0.95),) * 3, hu)
        for _ in range(16):
            d = rng.normal(0, 1, 3)
            d /= np.linalg.norm(d)
            for f in (1.1, 1.4, 1.7):
                b.ellipsoid(q + f * r * d, (3.0, 3.0, 4.5), hu - 120 * f, lungs)
        facts |= {"size_mm": round(2 * r), "lobe": "upper" if upper else "lower"}
    elif p.label == "sarcoidosis":
        n = int(rng.integers(260, 380) * s)
        side = rng.choice([-1, 1], n)
        q = np.stack(
            [side * rng.uniform(30, 115, n), rng.normal(5, 32, n), rng.normal(112, 34, n)], 1
        )
        sz, sy, sx = b.spacing
        i = np.clip(np.round((q[:, 2] - b.z[0, 0, 0]) / sz), 0, SHAPE[0] - 1).astype(int)
        j = np.clip(np.round((q[:, 1] - b.y[0, 0, 40]) / sy), 0, SHAPE[1] - 1).astype(int)
        k = np.clip(np.round((q[:, 0] - b.x[0, 40, 0]) / sx), 0, SHAPE[2] - 1).astype(int)
        dots = np.zeros(SHAPE, np.float32)
        dots[i, j, k] = rng.uniform(0.45, 0.9, n)
        b.blend(dots * lungs, 40)
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
        facts["node_mm"] = round(1.4 * size)


def simulate(p: Patient) -> Simulated:
    """A chest CT, int16 HU [32, 80, 80], about 9.4 x 4.5 x 4.5 mm, and what its report may say."""
    rng = p.rng("image")
    s = p.strength
    facts: dict[str, Any] = {}
    b = Body(rng, p.habitus)
    emphysema = p.label == "emphysema"
    barrel = rng.uniform(1.0, 1.18) if emphysema else rng.uniform(0.9, 1.14)
    flat = 0.25 + 0.35 * s if emphysema else rng.uniform(-0.5, 0.4)
    masks = _thorax(b, p, barrel, flat)
    lungs = masks["lungs"]
    _bones(b, masks["ay"])
    lung_hu = rng.uniform(-885, -770)  # depth of breath
    gravity = rng.uniform(15, 75) * np.clip(b.y / 80, -1, 1)
    b.blend(lungs, lung_hu + gravity + 18 * smooth_noise(rng, SHAPE, (6, 10, 10)))
    _vessel_tree(b, lungs, 0.55 if emphysema else rng.uniform(0.8, 1.1))
    heart = _heart(b, p, facts, masks["chest"])
    _airways(b)
    # The heart displaced lung: signs belong to what is still air.
    still = lungs * np.clip((-500 - b.hu) / 150 + 1, 0, 1)
    _signs(b, p, still if p.label != "lung_tumour" else lungs, masks["ay"], facts)
    _calcium(b, p, heart, facts, masks["chest"])
    if rng.uniform() < 0.2:
        facts["granuloma"] = True
        q = (rng.choice([-1, 1]) * rng.uniform(60, 95), rng.uniform(-30, 40), rng.uniform(80, 180))
        b.ellipsoid(q, (3.2, 3.2, 5), 500, lungs)
    couch = np.abs(b.y - (masks["ay"] + 62 + 22 * (p.habitus + 1) / 2) - 0.0012 * b.x**2)
    b.blend(np.clip(1.3 - couch / 4, 0, 1) * (1 - masks["skin"]) * np.ones(SHAPE, np.float32), -650)
    hu = gaussian_filter1d(b.hu, 0.35, axis=2, truncate=3)
    hu += rng.standard_normal(SHAPE, dtype=np.float32) * rng.uniform(10, 32)
    array = np.clip(np.round(hu), -1024, 3071).astype(np.int16)
    return Simulated(array=array, facts=facts, spacing_mm=b.spacing)
