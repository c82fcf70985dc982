"""What all DICOM readers share: opening a file, decoding its pixels, whose it is."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.readers.common import Unreadable, one_line

PACKAGES = ("pydicom", "pillow")
AGAIN = "export the file again from its archive"
_NAMES, _NUMBERS = ("PatientName", "OtherPatientNames"), ("PatientID", "AccessionNumber")


def open_dicom(path: Path) -> Any:
    """The data set of a file; raises Unreadable."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(path)
    except InvalidDicomError:
        raise Unreadable("not a DICOM file (no DICM after its preamble)", AGAIN) from None
    except Exception as error:
        raise Unreadable(f"the DICOM file cannot be parsed: {one_line(error)}", AGAIN) from None


def identifiers(data: Any) -> tuple[str, ...]:
    """Names and numbers of the patient in the header; to be compared with, never to be stored."""
    names = [text for name in _NAMES for text in _values(data, name)]
    numbers = [text for name in _NUMBERS for text in _values(data, name)]
    # "exam number" where a number should stand names nobody
    return (*names, *(text for text in numbers if any(c.isdigit() for c in text)))


def _values(data: Any, name: str) -> list[str]:
    value = data.get(name) or []
    return [str(each) for each in (value if isinstance(value, list | tuple) else [value])]


def pixels(data: Any) -> NDArray[Any]:
    """The stored values of a single frame: [rows, columns], or [rows, columns, 3] in RGB."""
    if "PixelData" not in data:
        raise Unreadable("the DICOM file holds no pixels", "name the file of the image itself")
    frames = int(data.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise Unreadable(f"the file holds {frames} frames", "export each frame as a file")
    try:
        array = data.pixel_array
    except Exception as error:
        reason = f"its pixels cannot be decoded: {one_line(error)}"
        raise Unreadable(reason, AGAIN + ", or without compression") from None
    return array[0] if array.ndim == 4 or (array.ndim == 3 and array.shape[0] == 1) else array


def numbers(data: Any, name: str, count: int) -> NDArray[np.float64]:
    """A header's numbers, such as ImagePositionPatient; raises Unreadable where they are not."""
    try:
        found = np.asarray(data.get(name), dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise Unreadable(f"the header has no valid {name}", AGAIN + " with its whole header")
    return found
