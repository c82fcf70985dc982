"""The eye of a simulated fundus photograph: the camera's frame, the layers, the vessels.

Frame: pixels of a right eye (disc to the image's right, macula in the middle); left eyes are
mirrored at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from m3bind.data.phantom.canvas import Floats, Ink, catmull_rom
from m3bind.data.phantom.patients import Patient

SIZE = 160

Vessel = tuple[np.ndarray, float, int]  # path [N, 2], width in pixels, depth


class Fundus:
    """One eye in the camera's field: landmarks (x, y), vessels, and what lies on the retina."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.facts: dict[str, Any] = {}
        self.y, self.x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
        # The field may be centred on the macula, on the disc, or between, and the head tilted.
        self.zoom = zoom = rng.uniform(0.88, 1.14)
        self.centre = np.array([79.5 - rng.uniform(-4, 14) * zoom, 79.5 + rng.normal(0, 7)])
        self.tilt = tilt = rng.normal(0, 0.08)
        nasal = np.array([43 * np.cos(tilt), 43 * np.sin(tilt) + rng.normal(-1, 2)])
        self.disc = self.centre + nasal * zoom
        self.macula = self.centre + np.array([-4 + rng.normal(0, 2), 4 + rng.normal(0, 2)])
        self.disc_r = rng.uniform(9.5, 12) * zoom
        self.veins: list[Vessel] = []
        self.arteries: list[Vessel] = []
        self.blocked: list[Vessel] = []  # arteries without flow
        self.spot = np.zeros((SIZE, SIZE, 3), np.float32)  # pale deposits: colour x opacity
        self.cover = np.zeros((SIZE, SIZE), np.float32)  # their opacity
        self.blood = np.zeros((SIZE, SIZE), np.float32)
        self.lesion = np.zeros((SIZE, SIZE), np.float32)  # in the choroid, below all vessels

    def distance2(self, point: Any) -> Floats:
        """Squared distance from a point."""
        return (self.x - point[0]) ** 2 + (self.y - point[1]) ** 2

    def pale(self, mask: Floats, colour: tuple[float, float, float]) -> None:
        """Deposit something pale on what is there."""
        m = np.clip(mask, 0, 1)
        self.spot = self.spot * (1 - m[..., None]) + m[..., None] * np.array(colour, np.float32)
        self.cover = self.cover * (1 - m) + m


def grow_vessels(f: Fundus, p: Patient) -> None:
    """Veins and arteries. Pressure narrows the arteries (artery to vein ratio 2:3 normally)."""
    rng = f.rng
    calibre = rng.uniform(2.6, 3.4) * f.zoom
    ratio = rng.uniform(0.68, 0.82)
    if p.label == "hypertension":
        ratio = 0.58 - 0.16 * p.strength
    veins = _tree(rng, f.disc, rng.choice([-1, 1]) * 3.0, calibre)
    arteries = _tree(rng, f.disc, rng.choice([-1, 1]) * 2.0, calibre * ratio)
    f.veins, f.arteries = (_place(tree, f.disc, f.zoom, -f.tilt) for tree in (veins, arteries))
    f.facts["av_ratio"] = round(ratio, 2)


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


def _place(vessels: list[Vessel], disc: np.ndarray, zoom: float, tilt: float) -> list[Vessel]:
    """Scale and turn a tree about the disc."""
    c, s = zoom * np.cos(tilt), zoom * np.sin(tilt)
    turn = np.array([[c, -s], [s, c]])
    return [((path - disc) @ turn + disc, width, depth) for path, width, depth in vessels]


def draw(vessels: list[Vessel]) -> Floats:
    """Vessels as ink, thin twigs fainter."""
    ink = Ink(SIZE)
    for path, width, depth in vessels:
        ink.taper(path, width, width * (0.5 if depth else 0.45), 1.0 if depth < 2 else 0.75)
    return ink.array()
