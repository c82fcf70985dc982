"""DICOM radiographs and photographs.

Grey images go through DICOM's own chain: modality LUT or rescale, then the file's first VOI LUT
or window (without either: lowest to highest value), then MONOCHROME1 is inverted, so that bone is
bright. The result spans 16 bit. Colour images become 8-bit RGB.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.readers.common import Reading, Unreadable, slices
from m3bind.data.readers.dicom import AGAIN, PACKAGES, identifiers, open_dicom, pixels

__all__ = ["PACKAGES", "read"]

_OTHER = ("CT", "MR", "PT", "NM", "US", "ECG", "SM", "SR", "DOC", "SEG", "RTSTRUCT", "RTDOSE")


def read(path: Path, part: str = "") -> list[Reading]:
    """One sample; ``part`` cuts it to ``rows,columns``, such as ``0:512,100:612``."""
    data = open_dicom(path)
    modality = str(data.get("Modality", ""))
    if modality in _OTHER:
        raise Unreadable(
            f"the file is no radiograph or photograph: its Modality is {modality}",
            "correct the manifest's modality or path",
        )
    if str(data.get("BurnedInAnnotation", "")).upper() == "YES":
        raise Unreadable(
            "the header says that text is burned into the image (BurnedInAnnotation)",
            "blank out the text, which may name the patient, and set the element to NO",
        )
    stored, photometric = pixels(data), str(data.get("PhotometricInterpretation", ""))
    steps: list[str] = []
    if photometric.startswith("MONOCHROME"):
        array = _grey(data, stored, photometric == "MONOCHROME1", steps)
    else:
        array = _colour(data, stored, photometric, steps)
    cut = slices(part, array.shape[:2], "pixels (rows,columns)")
    if cut:
        array = array[tuple(slice(*ends) for ends in cut)]
    if array.min() == array.max():
        raise Unreadable("every pixel has the same value", AGAIN)
    view = str(data.get("ViewPosition", "") or "")
    return [
        Reading(
            array=array,
            part="cut" if part else "",
            steps=steps,
            where={"part": part} if part else {},
            attributes={"view": view} if view in ("AP", "PA", "LL", "RL", "LATERAL") else {},
            identifiers=identifiers(data),
        )
    ]


def _grey(data: Any, stored: NDArray[Any], inverted: bool, steps: list[str]) -> NDArray[np.uint16]:
    from pydicom.pixels import apply_modality_lut

    if stored.ndim != 2:
        raise Unreadable(f"a grey image of the shape {stored.shape}", AGAIN)
    values = np.asarray(apply_modality_lut(stored, data), np.float64)
    if "ModalityLUTSequence" in data or "RescaleSlope" in data:
        steps.append("modality LUT or rescale")
    padding = _padding(data, stored)
    unit = _windowed(data, values, padding, steps)
    if inverted:
        unit = 1.0 - unit
        steps.append("MONOCHROME1 inverted")
    if padding is not None:
        unit[padding] = 0.0
        steps.append("padding made black")
    steps.append("scaled to 16 bit")
    return np.rint(unit * 65535.0).astype(np.uint16)


def _padding(data: Any, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    first = data.get("PixelPaddingValue")
    if first is None:
        return None
    last = data.get("PixelPaddingRangeLimit", first)
    found = (stored >= min(first, last)) & (stored <= max(first, last))
    return found if found.any() and not found.all() else None


def _windowed(
    data: Any, values: NDArray[np.float64], padding: NDArray[np.bool_] | None, steps: list[str]
) -> NDArray[np.float64]:
    """Values of interest as [0, 1] (DICOM PS3.3 C.11.2)."""
    if data.get("VOILUTSequence"):
        from pydicom.pixels import apply_voi

        descriptor = data.VOILUTSequence[0].LUTDescriptor
        steps.append("VOI LUT")
        looked_up = apply_voi(values.astype(np.int64), data)
        return np.clip(looked_up / (2.0 ** int(descriptor[2]) - 1.0), 0.0, 1.0)
    centre, width = (_first(data.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is not None and width is not None and width >= 1.0:
        function = str(data.get("VOILUTFunction", "") or "LINEAR")
        steps.append(f"window {function} centre {centre:g} width {width:g}")
        if function == "SIGMOID":
            return 1.0 / (1.0 + np.exp(-4.0 * (values - centre) / width))
        if function == "LINEAR":
            centre, width = centre - 0.5, max(width - 1.0, 1e-6)
        return np.clip((values - centre) / width + 0.5, 0.0, 1.0)
    shown = values if padding is None else values[~padding]
    low, high = float(shown.min()), float(shown.max())
    steps.append(f"no window: from lowest {low:g} to highest {high:g}")
    return np.clip((values - low) / max(high - low, 1e-6), 0.0, 1.0)


def _first(value: Any) -> float | None:
    """The first of one or several numbers of a header."""
    try:
        return float(value[0] if hasattr(value, "__getitem__") else value)
    except (TypeError, ValueError, IndexError):
        return None


def _colour(
    data: Any, stored: NDArray[Any], photometric: str, steps: list[str]
) -> NDArray[np.uint8]:
    from pydicom.pixels import apply_color_lut

    if photometric == "PALETTE COLOR":
        lut = apply_color_lut(stored, data)
        stored = (lut >> 8).astype(np.uint8) if lut.dtype == np.uint16 else lut
        steps.append("palette to RGB")
    # pydicom hands out YBR as RGB
    if stored.ndim != 3 or stored.shape[2] != 3 or stored.dtype != np.uint8:
        raise Unreadable(
            f"colour pixels {photometric} {stored.dtype} {stored.shape} are not read",
            "export it as 8-bit RGB",
        )
    return np.ascontiguousarray(stored)
