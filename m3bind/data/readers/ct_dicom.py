"""CT from DICOM: a folder with one series of axial slices, or one slice where ``part`` says so."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.readers import is_dicom
from m3bind.data.readers.common import Reading, Unreadable
from m3bind.data.readers.dicom import AGAIN, PACKAGES, identifiers, numbers, open_dicom, pixels
from m3bind.data.readers.volumes import to_int16, to_reading

__all__ = ["PACKAGES", "files", "read"]

_EVEN = 0.1  # how much the distance of slices may vary, as a share of it
_AIR = -1024


def files(path: Path) -> list[Path]:
    """The DICOM files of a series' folder, or the one file."""
    if path.is_file():
        return [path]
    found = [p for p in sorted(path.iterdir()) if p.is_file() and p.name != "DICOMDIR"]
    return [p for p in found if is_dicom(p)]


def read(path: Path, part: str = "") -> list[Reading]:
    """One sample; ``part`` cuts it to ``depth,rows,columns`` in voxels, cranial first."""
    found = files(path)
    if not found:
        raise Unreadable("no DICOM file in the folder", "name the folder that holds the slices")
    if path.is_file() and not part:
        raise Unreadable(
            "a single slice is not a volume",
            "name the folder of the series, or put 0:1 into the column part to take one slice",
        )
    slices = [data for data in map(open_dicom, found) if not _is_localizer(data)]
    if not slices:
        raise Unreadable("the folder holds localizers only", "name the folder of the slices")
    first = slices[0]
    _check_series(slices)
    normal = _normal(first)
    slices.sort(key=lambda data: float(normal @ numbers(data, "ImagePositionPatient", 3)))
    positions = np.stack([numbers(data, "ImagePositionPatient", 3) for data in slices])
    steps = [f"{len(slices)} slices sorted by ImagePositionPatient"]
    distance = _distance(positions, normal) if len(slices) > 1 else _thickness(first, steps)
    if len(slices) < len(found):
        steps.append(f"{len(found) - len(slices)} localizers left out")
    padded: list[int] = []
    values = np.stack([_hounsfield(data, padded) for data in slices])
    steps.append("HU = stored * RescaleSlope + RescaleIntercept")
    if sum(padded):
        steps.append(f"padding set to {_AIR} HU")
    reading = to_reading(
        to_int16(values, steps).transpose(2, 1, 0),
        _affine(first, positions[0], normal * distance),
        part,
        steps,
    )
    reading.identifiers = identifiers(first)
    return [reading]


def _is_localizer(data: Any) -> bool:
    return "LOCALIZER" in [str(word).upper() for word in data.get("ImageType", None) or []]


def _check_series(slices: list[Any]) -> None:
    first = slices[0]
    for data in slices:
        if str(data.get("Modality", "")) != "CT":
            raise Unreadable(
                f"the file's Modality is {data.get('Modality', 'not given')}, not CT",
                "correct the manifest's modality or path",
            )
    series = {str(data.get("SeriesInstanceUID", "")) for data in slices}
    if len(series) > 1:
        raise Unreadable(f"the folder holds {len(series)} series", "one folder a series")
    for name in ("Rows", "Columns", "ImageOrientationPatient", "PixelSpacing"):
        if any(data.get(name) != first.get(name) for data in slices):
            raise Unreadable(f"the slices differ in {name}", "one folder a series, one geometry")


def _normal(data: Any) -> NDArray[np.float64]:
    along_rows, along_columns = numbers(data, "ImageOrientationPatient", 6).reshape(2, 3)
    normal = np.cross(along_rows, along_columns)
    length = float(np.linalg.norm(normal))
    if not 0.99 < length < 1.01:
        raise Unreadable("ImageOrientationPatient is not two perpendicular directions", AGAIN)
    return normal / length


def _distance(positions: NDArray[np.float64], normal: NDArray[np.float64]) -> float:
    """Between slices, in mm; raises Unreadable for missing, double or tilted slices."""
    steps = np.diff(positions, axis=0)
    gaps = steps @ normal
    usual = float(np.median(gaps))
    place = positions[:-1] @ normal
    double = np.flatnonzero(gaps < max(0.01, 0.01 * usual))
    if len(double):
        raise Unreadable(
            f"{len(double)} slices stand twice, the first at {place[double[0]]:.2f} mm",
            "leave one of each in the folder (or one reconstruction, or one phase)",
        )
    missing = np.flatnonzero(gaps > (1 + _EVEN) * usual)
    if len(missing):
        at = missing[0]
        raise Unreadable(
            f"a slice is missing: {gaps[at]:.2f} mm after {place[at]:.2f} mm, where the others "
            f"lie {usual:.2f} mm apart",
            "export the whole series again",
        )
    if (gaps < (1 - _EVEN) * usual).any():
        raise Unreadable("the distance between the slices varies", "resample the series first")
    aside = np.linalg.norm(steps - gaps[:, None] * normal, axis=1)
    if (aside > _EVEN * usual).any():
        raise Unreadable("the gantry was tilted: each slice is shifted", "resample it upright")
    return float(gaps.mean())


def _thickness(data: Any, steps: list[str]) -> float:
    """Of a single slice, in mm."""
    try:
        thickness = float(data.SliceThickness)
        if thickness > 0:
            return thickness
    except (AttributeError, TypeError, ValueError):
        pass
    steps.append("thickness of the slice not given: taken as 1 mm")
    return 1.0


def _hounsfield(data: Any, padded: list[int]) -> NDArray[np.float64]:
    stored = pixels(data)
    try:
        slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
    except (AttributeError, TypeError, ValueError):
        raise Unreadable(
            "a slice has no RescaleSlope and RescaleIntercept: its HU are unknown", AGAIN
        ) from None
    unit = str(data.get("RescaleType", "") or "HU")
    if unit not in ("HU", "US"):
        raise Unreadable(f"the values are in {unit}, not HU", "export the usual reconstruction")
    values = stored * slope + intercept
    padding = data.get("PixelPaddingValue")
    if padding is not None:
        outside = (stored == padding) & (values < _AIR)
        values[outside] = _AIR
        padded.append(int(outside.sum()))
    return values


def _affine(
    data: Any, origin: NDArray[np.float64], step: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Indices (column, row, slice) to mm, from DICOM's directions (left, posterior) to RAS."""
    along_rows, along_columns = numbers(data, "ImageOrientationPatient", 6).reshape(2, 3)
    between_rows, between_columns = numbers(data, "PixelSpacing", 2)
    affine = np.eye(4)
    affine[:3, 0] = along_rows * between_columns
    affine[:3, 1] = along_columns * between_rows
    affine[:3, 2] = step
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
