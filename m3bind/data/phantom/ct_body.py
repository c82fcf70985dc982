"""The volume of a simulated chest CT: coordinates, and solids blended into it.

Coordinates in mm: x to the patient's left (the image's right), y to the back, z from head to
feet; the array is [D, H, W] = [z, y, x]. Shapes are blended with soft edges of one voxel, as
partial volume does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from m3bind.data.phantom.canvas import Floats

SHAPE = (32, 80, 80)


def soft(inside: Floats) -> Floats:
    """Signed distance (positive inside, in voxels) to coverage in [0, 1]."""
    return np.clip(inside + 0.5, 0, 1)


class Body:
    """Hounsfield units in their coordinates; the anatomy adds masks and landmarks for the signs."""

    skin: Floats  # everything of the patient
    chest: Floats  # within the ribs
    lungs: Floats
    air: Floats  # what heart and vessels left of the lungs
    back: float  # y of the thorax's inner wall
    coronaries: list[np.ndarray]  # paths [N, 3]
    aorta: np.ndarray  # path [N, 3] of arch and descending aorta
    aorta_r: float  # of its outside

    def __init__(self, rng: np.random.Generator) -> None:
        zoom = rng.uniform(0.98, 1.28)
        self.spacing = (9.4, round(4.5 * zoom, 3), round(4.5 * zoom, 3))
        self.rng = rng
        self.facts: dict[str, Any] = {}
        dx, dy, dz = rng.uniform(-22, 22), rng.uniform(-24, 24), rng.uniform(-24, 20)
        sz, sy, sx = self.spacing
        self.z = ((np.arange(SHAPE[0], dtype=np.float32) + 0.5) * sz - dz)[:, None, None]
        self.y = ((np.arange(SHAPE[1], dtype=np.float32) - 39.5) * sy - dy)[None, :, None]
        self.x = ((np.arange(SHAPE[2], dtype=np.float32) - 39.5) * sx - dx)[None, None, :]
        tilt = np.float32(rng.normal(0, 0.1))
        self.y, self.x = self.y + tilt * self.x, self.x - tilt * self.y  # [1, H, W]
        self.hu = np.full(SHAPE, -1000, np.float32)

    def blend(self, mask: Floats, hu: Any) -> None:
        """Replace by hu where mask is 1."""
        self.hu += mask * (hu - self.hu)

    def voxels(self, points: np.ndarray) -> np.ndarray:
        """Indices [3, N] of the voxels nearest to points [N, 3]; they may lie outside."""
        sz, sy, sx = self.spacing
        i = (points[:, 2] - self.z[0, 0, 0]) / sz
        j = (points[:, 1] - self.y[0, 0, 40]) / sy
        k = (points[:, 0] - self.x[0, 40, 0]) / sx
        return np.round([i, j, k]).astype(int)

    def _box(self, centre: Any, radius: Any) -> tuple[slice, slice, slice]:
        z, y, x = self.z[:, 0, 0], self.y[0, :, 40], self.x[0, 40, :]
        out = []
        for line, c, r in zip(
            (z, y, x), reversed(list(centre)), reversed(list(radius)), strict=True
        ):
            i = np.searchsorted(line, [c - 1.3 * r - 14, c + 1.3 * r + 14])
            out.append(slice(int(i[0]), int(i[1])))
        return out[0], out[1], out[2]

    def ellipsoid(self, centre: Any, radius: Any, hu: float, limit: Floats | None = None) -> None:
        """Blend an ellipsoid; centre and radius are (x, y, z) in mm."""
        box = self._box(centre, radius)
        cx, cy, cz = centre
        rx, ry, rz = radius
        r = np.sqrt(
            ((self.x[:, box[1], box[2]] - cx) / rx) ** 2
            + ((self.y[:, box[1], box[2]] - cy) / ry) ** 2
            + ((self.z[box[0]] - cz) / rz) ** 2
        )
        mask = soft((1 - r) * min(rx, ry) / 4.5)
        if limit is not None:
            mask = mask * limit[box]
        self.hu[box] += mask * (hu - self.hu[box])

    def tube(self, points: Any, radius: Any, hu: float, limit: Floats | None = None) -> None:
        """A chain of balls through points [N, 3]; radius in mm, one or N."""
        points = np.asarray(points, float)
        radii = np.broadcast_to(np.asarray(radius, float), (len(points),))
        for q, r in zip(points, radii, strict=True):
            self.ellipsoid(q, (r, r, max(r, 6.0)), hu, limit)
