"""What every simulated chest CT shows: thorax, bones, lungs, heart, great vessels, airways."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import smooth_noise
from m3bind.data.phantom.ct_body import SHAPE, Body, soft
from m3bind.data.phantom.patients import Patient

_CARINA = 118.0  # z


def thorax(b: Body, p: Patient) -> None:
    """The chest's wall and the abdomen; sets the masks. Emphysema: barrel chest, flat domes."""
    rng, s = b.rng, p.strength
    emphysema = p.label == "emphysema"
    barrel = rng.uniform(1.0, 1.18) if emphysema else rng.uniform(0.9, 1.14)
    flat = 0.25 + 0.35 * s if emphysema else rng.uniform(-0.5, 0.4)
    _wall(b, p, barrel)
    _abdomen(b, flat)


def _wall(b: Body, p: Patient, barrel: float) -> None:
    """Skin, fat, muscle and ribs."""
    rng, x, y, z = b.rng, b.x, b.y, b.z
    fat = 10 + 12 * (p.habitus + 1) + rng.uniform(0, 4)
    ax, ay = 128 + rng.normal(0, 7), 84 * barrel + rng.normal(0, 3)
    # The thorax narrows to the apex.
    profile = np.clip(1 - (np.clip(150 - z, 0, None) / 168) ** 2.2, 0.12, 1) ** 0.5
    rib_r = np.sqrt((x / (ax * profile)) ** 2 + (y / (ay * (0.35 + 0.65 * profile))) ** 2)
    wide = 0.86 + 0.14 * profile
    body_r = np.sqrt(
        (np.abs(x) / (ax * wide + 30 + fat)) ** 2.4 + (np.abs(y) / (ay + 26 + fat)) ** 2.4
    )
    b.skin = soft((1 - body_r) * 30)
    b.blend(b.skin, -105 + rng.normal(0, 4))
    muscle_r = np.sqrt((np.abs(x) / (ax * wide + 28)) ** 2.3 + (np.abs(y) / (ay + 21)) ** 2.3)
    b.blend(soft((1 - muscle_r) * 28), 52)
    b.blend(soft((1 - rib_r * 0.955) * 24), 52)

    # Ribs slope down to the front: a shell cut by oblique planes.
    phase = (z - 0.45 * y + 0.12 * np.abs(x)) / 24.5 + rng.uniform()
    stripe = np.clip(0.75 - np.abs(phase - np.round(phase)) * 2.9, 0, 0.5) * 2
    shell = np.clip(1.4 - np.abs(rib_r - 1.055) * 17, 0, 1)
    ribs = stripe * shell * (np.abs(x) > 18)
    b.blend(ribs * (y > -ay * 0.86), rng.uniform(330, 480))
    b.chest, b.back = soft((1 - rib_r) * 25), ay


def _abdomen(b: Body, flat: float) -> None:
    """Diaphragm, liver, spleen, stomach; what is above them, beside the mediastinum, is lung."""
    rng, x, y, z = b.rng, b.x, b.y, b.z
    # Two domes; the right one stands higher.
    top_r, top_l = 205 + 22 * flat + rng.normal(0, 5), 213 + 22 * flat + rng.normal(0, 5)
    curve = 48 * (1 - 0.75 * flat)
    dome = np.where(x < 0, top_r, top_l) + curve * (
        ((np.abs(x) - 62) / 75) ** 2 + np.clip((y - 5) / 78, -0.4, None) ** 2
    )
    above = soft((dome - z) / 9.4)
    b.ellipsoid((-40, -5, 290), (118, 88, 95), 60 + 40 * rng.uniform())
    below = b.chest * (1 - above)
    enhanced = rng.uniform(50, 115)
    b.blend(below * (x < 25), enhanced)
    b.blend(below * (x >= 25), -95)
    b.ellipsoid((75, 35, 262), (38, 40, 45), enhanced + 8, b.chest)
    b.ellipsoid((45, -25, 262), (36, 38, 38), 30, b.chest)
    b.ellipsoid((48, -42, 258), (24, 18, 26), -900, b.chest)

    # Mediastinum between the lungs, wider in front of the spine and around the heart.
    half = 21 + 13 * np.exp(-(((y - 50) / 30) ** 2)) + 4 * np.clip((z - 150) / 60, 0, 1)
    half = half - 12 * np.exp(-(((y + 70) / 26) ** 2))
    b.lungs = b.chest * above * soft((np.abs(x) - half) / 4.5)


def bones(b: Body) -> None:
    """Spine, scapulae, sternum."""
    rng, x, y, z = b.rng, b.x, b.y, b.z
    cy = b.back - 8
    d = np.sqrt((x / 17) ** 2 + ((y - cy) / 14) ** 2)
    vertebra = soft((1 - d) * 3.5)
    disc = np.clip(np.cos(2 * np.pi * (z / 23.0 + rng.uniform())) * 3 - 1.9, 0, 1)
    b.blend(vertebra * (1 - disc), 190 + 60 * rng.uniform())
    b.blend(np.clip(1 - np.abs(d - 0.95) * 5, 0, 1) * (1 - disc) * 0.8, 520)
    b.blend(vertebra * disc, 85)
    canal = np.sqrt((x / 8) ** 2 + ((y - cy - 20) / 7) ** 2)
    b.blend(np.clip(1 - np.abs(canal - 1.45) * 2.2, 0, 1) * (1 - 0.6 * disc), 420)
    b.blend(soft((1 - canal) * 1.6), 25)
    spinous = (np.abs(x) < 4) & (y > cy + 28) & (y < cy + 45)
    b.blend(spinous * (1 - disc) * 0.8, 330)
    for s in (-1, 1):  # scapulae
        t = np.abs((y - cy + 10) - 0.5 * (np.abs(x) - 95)) / 5
        blade = (
            np.clip(1.4 - t, 0, 1) * ((s * x > 68) & (s * x < 128)) * np.clip((150 - z) / 20, 0, 1)
        )
        b.blend(blade * 0.8, 300)
    sternum = np.sqrt((x / 17) ** 2 + ((y + b.back + 9) / 6.5) ** 2)
    b.blend(soft((1 - sternum) * 1.5) * np.clip((z - 60) / 10, 0, 1) * (z < 225), 240)


def lungs(b: Body, p: Patient) -> None:
    """Air, denser where gravity pulls, and vessels, which emphysema thins out."""
    rng = b.rng
    hu = rng.uniform(-885, -770)  # depth of breath
    gravity = rng.uniform(15, 75) * np.clip(b.y / 80, -1, 1)
    b.blend(b.lungs, hu + gravity + 18 * smooth_noise(rng, SHAPE, (6, 10, 10)))
    _vessel_tree(b, 0.55 if p.label == "emphysema" else rng.uniform(0.8, 1.1))


def _vessel_tree(b: Body, amount: float) -> None:
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
    at = b.voxels(q)
    inside = ((at >= 0) & (at < np.array(SHAPE)[:, None])).all(0)
    field = np.zeros(SHAPE, np.float32)
    np.maximum.at(field, tuple(at[:, inside]), weight[inside])
    field = gaussian_filter(field, (0.25, 0.45, 0.45), truncate=2.5) * 1.9
    b.blend(np.clip(field * amount, 0, 1) * b.lungs, 60)


def heart(b: Body, p: Patient) -> None:
    """Chambers, aorta and pulmonary arteries; sets the paths along which calcium lies."""
    rng, s = b.rng, p.strength
    grow = rng.uniform(0.9, 1.12)
    wall = rng.uniform(8.5, 10.5)
    b.aorta_r = rng.uniform(13.5, 16) + 0.04 * (p.age - 60)
    thick, sway = 0.0, 5.0  # mm on the left ventricle's outside; of the descending aorta
    if p.label == "heart_failure":
        grow = 1.08 + 0.12 * s
        wall *= 0.9
    elif p.label == "hypertension":
        wall = 14.5 + 7 * s + rng.uniform(0, 1.5)
        b.aorta_r = 18.0 + 4.5 * s + rng.uniform(0, 1.5)
        grow *= 1.03
        thick, sway = 3.0, 5 + 9 * s
    contrast = rng.uniform(140, 380)
    b.facts |= {
        "wall_mm": round(wall),
        "aorta_mm": round(2 * b.aorta_r),
        "contrast_hu": round(contrast),
    }
    _chambers(b, grow, wall, thick, contrast)
    _great_vessels(b, sway, contrast)


def _chambers(b: Body, g: float, wall: float, thick: float, contrast: float) -> None:
    """Right heart in front, left ventricle to the left and back, left atrium behind."""
    cx, cy, cz = 14 + 6 * (g - 1) * 10, -22, 180
    muscle, right = b.rng.uniform(85, 115), contrast - 25
    b.ellipsoid((cx, cy, cz), (60 * g, 50 * g, 52 * g), -60, b.chest)  # fat
    b.ellipsoid((cx, cy, cz), (56 * g, 46 * g, 48 * g), muscle, b.chest)
    b.ellipsoid((cx - 30 * g, cy - 8, cz), (21 * g, 26 * g, 34 * g), right)
    b.ellipsoid((cx - 2, cy - 25 * g, cz + 4), (28 * g, 15 * g, 32 * g), right)
    lv = (cx + 24 * g, cy + 6, cz + 8)
    outer = np.array([30.0, 27.0, 37.0]) * g + thick
    b.ellipsoid(lv, outer, muscle)
    b.ellipsoid(lv, outer - wall, contrast)
    b.ellipsoid((cx - 4, cy + 33 * g, cz - 24), (27 * g, 15 * g, 20 * g), contrast)
    root = np.array([cx, cy, 0])
    b.coronaries = [  # anterior descending, circumflex, right
        _arc(root, (6, -22 * g, 142), (34 * g, -44 * g, 165), (38 * g, -28 * g, 208)),
        _arc(root, (10, -4, 142), (52 * g, -2, 152), (46 * g, 30 * g, 190)),
        _arc(root, (-16, -22 * g, 150), (-62 * g, -36 * g, 175), (-30 * g, 8, 218)),
    ]


def _arc(root: np.ndarray, *points: tuple[float, float, float]) -> np.ndarray:
    """A path [14, 3] from the first to the third of three points, bent by the second (Bezier)."""
    a, m, e = (root + q for q in points)
    t = np.linspace(0, 1, 14)[:, None]
    return (1 - t) ** 2 * a + 2 * t * (1 - t) * m + t**2 * e


def _great_vessels(b: Body, sway: float, contrast: float) -> None:
    """Aorta, pulmonary arteries, superior vena cava."""
    # Aorta: root, ascending, arch over the left bronchus, descending beside the spine.
    t = np.linspace(0, np.pi, 12)
    arch = np.stack([np.linspace(-16, 24, 12), -22 + 36 * (1 - np.cos(t)), 102 - 30 * np.sin(t)], 1)
    up = np.stack([np.linspace(-2, -16, 7), np.full(7, -24), np.linspace(160, 102, 7)], 1)
    zd = np.linspace(102, 292, 22)
    down = np.stack([24 + sway * np.sin((zd - 100) / 45), np.full(22, 50.0), zd], 1)
    b.tube(up, b.aorta_r, contrast, b.chest)
    b.tube(arch, b.aorta_r * 0.92, contrast, b.chest)
    b.tube(down, b.aorta_r * 0.85, contrast - 10, b.chest)
    b.aorta = np.concatenate([arch, down])
    # Pulmonary trunk and its two arteries, superior vena cava.
    trunk = [(6, -28, 142), (8, -14, 132), (4, 2, 128)]
    b.tube(trunk, 14, contrast - 15, b.chest)
    b.tube([(-10, 6, 128), (-26, 8, 130), (-42, 8, 134)], 10, contrast - 15, b.chest)
    b.tube([(18, 10, 124), (32, 16, 124), (44, 18, 128)], 10, contrast - 15, b.chest)
    vena = np.stack([np.full(10, -30.0), np.full(10, -14.0), np.linspace(60, 150, 10)], 1)
    b.tube(vena, 8.5, contrast + b.rng.uniform(-60, 60), b.chest)


def airways(b: Body) -> None:
    """Trachea and main bronchi."""
    z = np.linspace(-5, _CARINA, 18)
    trachea = np.stack([np.zeros(18), 2 + 0.10 * z, z], 1)
    b.tube(trachea, 9.5, -995)
    for side, steep in ((-1, 1.0), (1, 0.8)):
        t = np.linspace(0, 1, 8)
        path = np.stack([side * 46 * t, 14 + 6 * t, _CARINA + 34 * steep * t], 1)
        b.tube(path, 7 - 1.5 * t, -990)
