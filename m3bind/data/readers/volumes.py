"""What CT readers share: one orientation for all volumes, and HU that can be what they claim."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.readers.common import Reading, Unreadable, slices

# Depth from head to foot, rows from front to back, columns from the patient's right to left: each
# slice as radiologists look at it, the topmost first.
_AXES = ("I", "P", "L")
ORIENTATION = "depth cranial to caudal, rows anterior to posterior, columns right to left"
_STRAIGHT = 0.9  # cosine between an axis of the file and of the patient; 26 degrees
_RAISED = "write the volume again, with slope and intercept applied exactly once"


def to_reading(
    hu: NDArray[np.int16], affine: NDArray[np.float64], part: str, steps: list[str]
) -> Reading:
    """A volume in the orientation of all; ``affine`` takes indices to mm, right to left, RAS."""
    import nibabel as nib

    columns = affine[:3, :3]
    zooms = np.sqrt((columns**2).sum(0))
    if not np.isfinite(affine).all() or zooms.min() <= 0:
        raise Unreadable("the geometry is invalid (no voxel size)", "export the series again")
    if np.abs(columns / zooms).max(0).min() < _STRAIGHT:
        raise Unreadable(
            "the slices are oblique by more than 26 degrees", "resample to axial slices first"
        )
    ours = nib.orientations.axcodes2ornt(_AXES)
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), ours)
    hu = nib.orientations.apply_orientation(hu, turn)
    spacing = [0.0, 0.0, 0.0]
    for axis, target in enumerate(turn[:, 0].astype(int)):
        spacing[target] = round(float(zooms[axis]), 6)
    steps.append(ORIENTATION)
    # Of the whole: a part may hold nothing but lung.
    fault = hounsfield_fault(hu)
    if fault:
        raise Unreadable(fault, _RAISED)
    cut = slices(part, hu.shape, "voxels (depth,rows,columns)")
    if cut:
        hu = hu[tuple(slice(*ends) for ends in cut)]
    where: dict[str, Any] = {"part": part} if part else {}
    return Reading(
        array=np.ascontiguousarray(hu),
        part="cut" if part else "",
        steps=steps,
        where=where,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
    )


def to_int16(values: NDArray[np.float64], steps: list[str]) -> NDArray[np.int16]:
    """Hounsfield units as int16: exact where they are whole, else the nearest."""
    if not np.isfinite(values).all():
        raise Unreadable("some voxels are not numbers (NaN or infinite)", _RAISED)
    whole = np.rint(values)
    if whole.min() < -32768 or whole.max() > 32767:
        raise Unreadable(
            f"values from {whole.min():g} to {whole.max():g} HU cannot be", "look at the slope"
        )
    if not np.array_equal(whole, values):
        steps.append("rounded to whole HU")
    return whole.astype(np.int16)


def hounsfield_fault(hu: NDArray[np.int16]) -> str | None:
    """What is wrong with the intensities of a CT, or None. Physics sets the measure.

    Air lies at -1000 HU, fat, water, muscle and brain within [-150, 100], and nothing below
    -1024 but the padding outside the field of view, which is one constant (-2000, -2048, -3024
    or -8192, as scanners write it).

    - Rescaled twice (HU - 1024 once more): more than 2 % of the voxels lie below -1300 besides
      the commonest of those values (lung and noisy air); or, where air was clipped to a constant
      before, fewer than 2 % in [-150, 100] while others lie in [-1300, -800] and below.
    - Never rescaled (HU + 1024): more than a tenth near 1024, and nearly none in [-1200, -200].
    - No tissue at all: fewer than 0.1 % in [-150, 100].
    """
    voxels = hu.ravel()[:: max(1, hu.size // 2_000_000)]

    def share(low: int, high: int) -> float:
        return float(np.mean((voxels >= low) & (voxels <= high)))

    tissue, raised = share(-150, 100), share(850, 1200)
    if raised > 0.1 and share(-1200, -200) < 0.01:
        return (
            f"the values ({raised:.0%} of the voxels near 1024, where tissue would be without the "
            "intercept) look as if they had never been rescaled to Hounsfield units"
        )
    low = voxels[voxels < -1300]
    scattered = (len(low) - np.unique(low, return_counts=True)[1].max(initial=0)) / len(voxels)
    below = len(low) / len(voxels)
    if scattered > 0.02 or (tissue < 0.02 and below > 0.01 and share(-1300, -800) > 0.01):
        return (
            f"the values ({below:.0%} of the voxels below -1300 HU, {tissue:.1%} in the range of "
            "soft tissue) look as if they had been rescaled twice"
        )
    if tissue < 0.001:
        return f"only {tissue:.2%} of the voxels lie within -150 to 100 HU: no tissue in it"
    return None
