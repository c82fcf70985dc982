"""Simulated colour fundus photographs: layered reflection of choroid, retina, vessels and disc.

Frame: pixels of a right eye (disc to the image's right, macula in the middle); left eyes are
mirrored at the end. Colours are a base reflectance attenuated by pigments' optical densities
(Beer-Lambert), with pale deposits blended on top.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from m3bind.data.phantom.canvas import Floats, Ink, Simulated, catmull_rom, smooth_noise
from m3bind.data.phantom.patients import Patient

SIZE = 160
_ARTERY = np.array([0.10, 0.55, 0.40], np.float32)
_VEIN = np.array([0.26, 0.80, 0.50], np.float32)
_BLOOD = np.array([0.36, 1.10, 0.70], np.float32)
_MELANIN = np.array([0.30, 0.40, 0.45], np.float32)

Vessel = tuple[np.ndarray, float, int]  # path [N, 2], width in pixels, depth


def _grow(
    rng: np.random.Generator,
    path: np.ndarray,
    width: float,
    depth: int,
    out: list[Vessel],
    side: float,
) -> None:
    """Store a vessel and let branches grow from it, alternately to either side."""
    out.append((path, width, depth))
    if depth >= 2 or width < 0.9:
        return
    for i, f in enumerate(np.linspace(0.28, 0.85, 4 if depth == 0 else 2)):
        k = int(f * (len(path) - 2))
        along = path[k + 1] - path[k]
        heading = np.arctan2(along[1], along[0])
        heading += (side if i % 2 == 0 else -side) * rng.uniform(0.5, 0.9)
        n = 9
        turns = heading + np.cumsum(rng.normal(0, 0.11, n)) - 0.03 * side * np.arange(n)
        step = (5.5 if depth == 0 else 4.0) * rng.uniform(0.8, 1.2)
        branch = path[k] + np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1) * step, 0)
        branch = np.concatenate([path[k][None], branch])
        _grow(rng, branch, width * (1 - 0.35 * f) * 0.62, depth + 1, out, -side)


def _tree(rng: np.random.Generator, disc: np.ndarray, shift: float, width: float) -> list[Vessel]:
    """Four arcades: temporal ones arch over the macula, nasal ones run outwards."""
    out: list[Vessel] = []
    for up in (-1, 1):
        k = rng.normal(1, 0.07)
        o = shift * up
        dx = np.array([0, -7, -22, -44, -68, -92]) + o * 0.4
        dy = np.array([0, 17, 34, 42, 39, 27]) * k + o
        points = (
            disc
            + np.stack([dx, up * dy], 1)
            + rng.normal(0, 1.5, (6, 2)) * [[0], [1], [1], [1], [1], [1]]
        )
        _grow(rng, catmull_rom(points), width, 0, out, up)
        dx = np.array([0, 8, 20, 36, 54, 76])
        dy = np.array([0, 13, 26, 38, 48, 58]) * k * rng.uniform(0.7, 1.1) + o
        points = disc + np.stack([dx, up * dy], 1)
        _grow(rng, catmull_rom(points), width * 0.8, 0, out, -up)
    return out


def _place(vessels: list[Vessel], disc: np.ndarray, zoom: float, tilt: float) -> list[Vessel]:
    """Scale and turn a tree about the disc."""
    c, s = zoom * np.cos(tilt), zoom * np.sin(tilt)
    turn = np.array([[c, -s], [s, c]])
    return [((path - disc) @ turn + disc, width, depth) for path, width, depth in vessels]


def _draw(vessels: list[Vessel], cut: np.ndarray | None = None) -> Floats:
    ink = Ink(SIZE)
    for path, width, depth in vessels:
        ink.taper(path, width, width * (0.5 if depth else 0.45), 1.0 if depth < 2 else 0.75)
    return ink.array()


def simulate(p: Patient) -> Simulated:
    """A fundus photograph, uint8 RGB [160, 160, 3], and what its report may say."""
    rng = p.rng("image")
    s = p.strength
    facts: dict[str, Any] = {"eye": p.side}
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    # The field may be centred on the macula, on the disc, or between, and the head may be tilted.
    zoom = rng.uniform(0.88, 1.14)
    centre = np.array([79.5 - rng.uniform(-4, 14) * zoom, 79.5 + rng.normal(0, 7)])
    tilt = rng.normal(0, 0.08)
    disc = centre + np.array([43 * np.cos(tilt), 43 * np.sin(tilt) + rng.normal(-1, 2)]) * zoom
    macula = centre + np.array([-4 + rng.normal(0, 2), 4 + rng.normal(0, 2)])
    disc_r = rng.uniform(9.5, 12) * zoom

    # Choroid and pigment epithelium: colour, pigmentation, tessellation.
    base = np.array([0.93, 0.47, 0.20], np.float32) * rng.uniform(0.85, 1.1, 3).astype(np.float32)
    pigment = rng.uniform(0.0, 0.9)
    tess = np.abs(smooth_noise(rng, (SIZE, SIZE), (13, 13)))
    tess = np.exp(-((tess / 0.35) ** 2)) * rng.uniform(0.0, 0.35) * (0.5 + p.age / 120)
    density = pigment + rng.uniform(0.1, 0.4) * smooth_noise(rng, (SIZE, SIZE), (4, 4)) - 0.3 * tess
    r_mac = np.hypot(x - macula[0], y - macula[1]) / zoom
    density += rng.uniform(0.35, 0.8) * np.exp(-((r_mac / rng.uniform(11, 16)) ** 2))
    od = density[..., None] * _MELANIN

    # Vessels. Pressure narrows the arteries (artery to vein ratio 2:3 normally).
    calibre = rng.uniform(2.6, 3.4) * zoom
    ratio = rng.uniform(0.68, 0.82)
    if p.label == "hypertension":
        ratio = 0.58 - 0.16 * s
    veins = _tree(rng, disc, rng.choice([-1, 1]) * 3.0, calibre)
    arteries = _tree(rng, disc, rng.choice([-1, 1]) * 2.0, calibre * ratio)
    veins, arteries = (_place(tree, disc, zoom, -tilt) for tree in (veins, arteries))
    facts["av_ratio"] = round(ratio, 2)
    vein = _draw(veins)
    spot = np.zeros((SIZE, SIZE, 3), np.float32)  # pale deposits: colour x opacity
    cover = np.zeros((SIZE, SIZE), np.float32)
    blood = np.zeros((SIZE, SIZE), np.float32)

    def pale(mask: Floats, colour: tuple[float, float, float]) -> None:
        nonlocal cover, spot
        m = np.clip(mask, 0, 1)
        spot = spot * (1 - m[..., None]) + m[..., None] * np.array(colour, np.float32)
        cover = cover * (1 - m) + m

    # The nerve fibre layer shines, more in the young: broad pale patches without meaning.
    sheen = np.clip(smooth_noise(rng, (SIZE, SIZE), (6, 6)) - 0.6, 0, 1.5)
    pale(sheen * rng.uniform(0.0, 0.32), (0.93, 0.80, 0.60))
    blocked: list[Vessel] = []
    if p.label == "atrial_fibrillation":
        arteries, blocked = _occlude(p, rng, arteries, x, y, pale, zoom, facts)
    artery = _draw(arteries)
    if p.label == "hypertension":
        crossing = np.clip(gaussian_filter(artery * vein, 1.6) * 14, 0, 1)
        vein = vein * (1 - crossing * min(1.0, 0.4 + 0.6 * s))
        _pressure(p, rng, disc, x, y, blood, pale, zoom, facts)
    elif p.label == "diabetes":
        _sugar(p, rng, macula, disc, blood, pale, zoom, facts)
    elif p.label == "sarcoidosis":
        _wax(p, rng, veins, x, y, pale, zoom, facts)

    lesion = np.zeros((SIZE, SIZE), np.float32)
    if p.label == "lung_tumour":
        lesion = _metastasis(p, rng, centre, disc, x, y, zoom, facts)
    elif p.age > 60 and rng.uniform() < 0.4:
        ink = Ink(SIZE)  # a few drusen belong to age
        for q in macula + rng.normal(0, 13, (rng.integers(3, 9), 2)):
            ink.disc(q[0], q[1], rng.uniform(0.6, 1.2))
        pale(0.35 * gaussian_filter(ink.array(), 0.5), (0.95, 0.75, 0.4))
        facts["drusen"] = True

    # Compose: choroid (with a metastasis in it), deposits in the retina, then vessels and blood.
    light = base * np.exp(-od)
    creamy = np.array([0.98, 0.80, 0.50], np.float32) * (0.75 + 0.25 * base)
    light = light * (1 - 0.8 * lesion[..., None]) + 0.8 * lesion[..., None] * creamy
    light = _disc(light, rng, disc, disc_r, x, y)
    over = cover[..., None]
    deep = light * (1 - over) + spot
    vessel_od = artery[..., None] * _ARTERY + vein[..., None] * _VEIN
    reflex = _draw([(q, w * 0.3, d) for q, w, d in arteries if w > 1.4])
    vessel_od -= 0.22 * reflex[..., None]
    if blocked:
        vessel_od += _draw([(q, max(w * 0.55, 0.5), d) for q, w, d in blocked])[..., None] * _ARTERY
    hide = 1.0 if p.label != "sarcoidosis" else 1 - 0.75 * over
    deep = deep * np.exp(-vessel_od * hide - blood[..., None] * _BLOOD)
    image = _photograph(deep, p, rng, x, y, facts)
    if p.side == "left":
        image = image[:, ::-1]
    return Simulated(array=np.ascontiguousarray(image), facts=facts)


def _disc(light: Floats, rng: Any, disc: Any, r: float, x: Floats, y: Floats) -> Floats:
    """The optic disc: an orange-yellow ellipse with a pale cup."""
    d = np.hypot((x - disc[0]) * 1.08, y - disc[1])
    rim = (1 / (1 + np.exp((d - r) / 0.7)))[..., None]
    cup_r = r * rng.uniform(0.25, 0.5)
    cup = (1 / (1 + np.exp((np.hypot(x - disc[0] + 1, y - disc[1]) - cup_r) / 0.9)))[..., None]
    colour = np.array([1.0, 0.76, 0.48], np.float32)
    pale = np.array([1.0, 0.92, 0.74], np.float32)
    light = light * (1 - 0.85 * rim) + 0.85 * rim * colour
    return light * (1 - 0.7 * cup) + 0.7 * cup * pale


def _occlude(
    p: Patient,
    rng: np.random.Generator,
    arteries: list[Vessel],
    x: Floats,
    y: Floats,
    pale: Any,
    zoom: float,
    facts: dict[str, Any],
) -> tuple[list[Vessel], list[Vessel]]:
    """An embolus stops in a temporal artery; the retina that it fed turns pale."""
    s = p.strength
    trunks = [i for i, v in enumerate(arteries) if v[2] == 0]
    upper = bool(rng.uniform() < 0.5)
    start = trunks[0] if upper else trunks[2]
    end = trunks[1] if upper else trunks[3]
    path, width, _ = arteries[start]
    k = int(rng.uniform(0.2, 0.4) * len(path))
    beyond = path[k]
    kept = [*arteries[:start], (path[: k + 1], width, 0)]
    blocked = [(path[k:], width * 0.8, 0)]
    for v in arteries[start + 1 : end]:
        far = v[0][0][0] < beyond[0]
        (blocked if far else kept).append(v)
    kept += arteries[end:]
    # The sector between the arcade and the horizontal raphe, and beyond the arcade.
    q = path[k:]
    inward = np.array([[0, (17 if upper else -17) * zoom]])
    sector = np.concatenate([q, q[::-1] + inward])
    outer = np.concatenate([q, q[::-1] - 0.65 * inward])
    ink = Ink(SIZE, 1)
    ink.polygon(sector)
    ink.polygon(outer)
    mask = gaussian_filter(ink.array(), 4.5)
    mask *= 0.85 + 0.15 * smooth_noise(rng, (SIZE, SIZE), (10, 10))
    pale(np.clip(mask * (0.3 + 0.25 * s), 0, 0.75), (0.93, 0.80, 0.60))
    dot = np.exp(-(((x - beyond[0]) ** 2 + (y - beyond[1]) ** 2) / (2.1 * zoom) ** 2))
    facts["branch"] = "superior temporal" if upper else "inferior temporal"
    pale(np.clip(1.6 * dot, 0, 1), (1.0, 0.96, 0.72))
    return kept, blocked


def _pressure(
    p: Patient,
    rng: np.random.Generator,
    disc: np.ndarray,
    x: Floats,
    y: Floats,
    blood: Floats,
    pale: Any,
    zoom: float,
    facts: dict[str, Any],
) -> None:
    """Flame haemorrhages along the nerve fibres and cotton wool spots."""
    s = p.strength
    ink = Ink(SIZE)
    flames = int(rng.integers(4, 7) + 8 * (s - 0.6) * 2.5)
    for _ in range(flames):
        a, r = rng.uniform(0, 2 * np.pi), rng.uniform(15, 48) * zoom
        q = disc + r * np.array([np.cos(a), np.sin(a)])
        for _ in range(6):
            b = a + rng.normal(0, 0.12)
            length = rng.uniform(2.5, 6.5) * zoom
            o = q + rng.normal(0, 1.1, 2)
            e = o + length * np.array([np.cos(b), np.sin(b)])
            ink.taper([o, (o + e) / 2, e], 1.5, 0.5)
    blood += 0.9 * gaussian_filter(ink.array(), 0.4)
    spots = int(rng.integers(2, 4) + (s > 0.7) + 2 * (s > 0.9))
    wool = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(spots):
        a, r = rng.uniform(0.5 * np.pi, 1.5 * np.pi), rng.uniform(18, 44) * zoom
        q = disc + r * np.array([np.cos(a), np.sin(a)])
        for o in q + rng.normal(0, 1.8, (4, 2)):
            wool += 0.5 * np.exp(-(((x - o[0]) ** 2 + (y - o[1]) ** 2) / (2.3 * zoom) ** 2))
    pale(np.clip(wool, 0, 0.85), (0.97, 0.92, 0.80))
    facts |= {"flames": flames, "wool": spots}


def _sugar(
    p: Patient,
    rng: np.random.Generator,
    macula: np.ndarray,
    disc: np.ndarray,
    blood: Floats,
    pale: Any,
    zoom: float,
    facts: dict[str, Any],
) -> None:
    """Microaneurysms, dot and blot haemorrhages, hard exudates around the macula."""
    s = p.strength
    ink = Ink(SIZE)
    dots = int(rng.integers(18, 30) * s)
    for q in macula + rng.normal(0, 27 * zoom, (dots, 2)):
        ink.disc(q[0], q[1], rng.uniform(0.5, 1.0), 0.9)
    blots = int(rng.integers(5, 9) * s)
    for q in macula + rng.normal(0, 27 * zoom, (blots, 2)):
        ink.disc(q[0], q[1], rng.uniform(1.2, 2.4) * zoom)
    blood += ink.array()
    ink = Ink(SIZE)
    for _ in range(int(2 + 3 * s)):
        a, r = rng.uniform(0, 2 * np.pi), rng.uniform(7, 24) * zoom
        q = macula + r * np.array([np.cos(a), np.sin(a)])
        ring = rng.uniform(3, 6) * zoom  # circinate: around a leaking point
        for b in rng.uniform(0, 2 * np.pi, 10):
            o = q + ring * np.array([np.cos(b), np.sin(b)]) + rng.normal(0, 0.7, 2)
            ink.disc(o[0], o[1], rng.uniform(0.5, 1.2))
    pale(0.9 * ink.array(), (1.0, 0.86, 0.42))
    facts |= {"dots": dots, "blots": blots}


def _metastasis(
    p: Patient,
    rng: np.random.Generator,
    centre: np.ndarray,
    disc: np.ndarray,
    x: Floats,
    y: Floats,
    zoom: float,
    facts: dict[str, Any],
) -> Floats:
    """A creamy, slightly mottled choroidal plaque with an indistinct edge."""
    s = p.strength
    a = rng.uniform(0.55 * np.pi, 1.45 * np.pi)
    q = centre + rng.uniform(12, 44) * zoom * np.array([np.cos(a), np.sin(a)])
    radius = (11 + 9 * (s - 0.6) * 2.5 + rng.uniform(0, 3)) * zoom
    wobble = 1 + 0.13 * smooth_noise(rng, (SIZE, SIZE), (6, 6))
    stretch = rng.uniform(0.8, 1.25)
    d = np.hypot((x - q[0]) * stretch, (y - q[1]) / stretch) * wobble
    mask = 1 / (1 + np.exp((d - radius) / 1.5))
    mottle = np.exp(-((smooth_noise(rng, (SIZE, SIZE), (30, 30)) - 1.4) ** 2) / 0.25)
    facts |= {
        "disc_diameters": round(float(2 * radius / (21.5 * zoom)), 1),
        "quadrant": ("superior" if q[1] < centre[1] else "inferior") + " temporal",
    }
    return mask * (1 - 0.45 * mottle)


def _wax(
    p: Patient,
    rng: np.random.Generator,
    veins: list[Vessel],
    x: Floats,
    y: Floats,
    pale: Any,
    zoom: float,
    facts: dict[str, Any],
) -> None:
    """Candle wax sheathing along stretches of veins; snowballs in the inferior vitreous."""
    s = p.strength
    ink = Ink(SIZE)
    stretches = 0
    for path, width, depth in veins:
        if depth > 1 or len(path) < 8:
            continue
        for _ in range(int(rng.integers(1, 3)) if depth == 0 else int(rng.uniform() < 0.5 * s)):
            k = int(rng.uniform(0.12, 0.7) * len(path))
            stretches += 1
            for q in path[k : k + int(4 + 5 * s)]:
                o = q + rng.normal(0, 0.6, 2)
                ink.disc(o[0], o[1], width * rng.uniform(0.5, 0.95), rng.uniform(0.7, 1))
    pale(0.8 * gaussian_filter(ink.array(), 0.6), (0.97, 0.88, 0.66))
    balls = int(3 + 6 * s)
    for _ in range(balls):
        a, r = rng.uniform(0.15 * np.pi, 0.85 * np.pi), rng.uniform(30, 66) * zoom
        ox, oy = 79.5 + r * np.cos(a), 79.5 + r * np.sin(a)
        d2 = (x - ox) ** 2 + (y - oy) ** 2
        pale(0.75 * np.exp(-((d2 / (2.6 * zoom) ** 2) ** 1.5)), (0.93, 0.90, 0.80))
    facts |= {"sheaths": stretches, "snowballs": balls}


def _photograph(
    deep: Floats,
    p: Patient,
    rng: np.random.Generator,
    x: Floats,
    y: Floats,
    facts: dict[str, Any],
) -> np.ndarray:
    """Illumination, haze of the lens, exposure, colour balance, noise and the camera's mask."""
    lx, ly = rng.normal(0, 22, 2) + 79.5
    r2 = ((x - lx) ** 2 + (y - ly) ** 2) / 80.0**2
    light = 1 - rng.uniform(0.1, 0.5) * r2
    light += rng.uniform(0.05, 0.22) * smooth_noise(rng, (SIZE, SIZE), (3, 3))
    haze = rng.uniform(0, 0.10) + 0.002 * max(p.age - 60, 0)
    image = deep * light[..., None] * (1 - haze) + haze * np.array([0.75, 0.6, 0.45], np.float32)
    if rng.uniform() < 0.2:  # a crescent of stray light
        a = rng.uniform(0, 2 * np.pi)
        edge = ((x - 79.5) * np.cos(a) + (y - 79.5) * np.sin(a)) / 80
        image += 0.35 * np.clip(edge - 0.72, 0, 1)[..., None] * np.array([1, 0.8, 0.9], np.float32)
        facts["artefact"] = True
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
