"""CT from NIfTI: stored values by the file's own slope and intercept, exactly once."""

from pathlib import Path

import numpy as np

from m3bind.data.readers.common import Reading, Unreadable, one_line
from m3bind.data.readers.volumes import to_int16, to_reading

PACKAGES = ("nibabel",)
_AGAIN = "fetch the file again, or convert the series anew"


def read(path: Path, part: str = "") -> list[Reading]:
    """One sample; ``part`` cuts it to ``depth,rows,columns`` in voxels, cranial first."""
    import nibabel as nib

    try:
        image = nib.load(path)
        header, affine = image.header, np.asarray(image.affine, np.float64)
        stored = np.asanyarray(image.dataobj.get_unscaled())
    except Exception as error:
        reason = f"the NIfTI file cannot be read: {one_line(error).replace(str(path), path.name)}"
        raise Unreadable(reason, _AGAIN) from None
    while stored.ndim > 3 and stored.shape[-1] == 1:
        stored = stored[..., 0]
    if stored.ndim != 3 or stored.dtype.fields:
        raise Unreadable(f"the image has the shape {stored.shape}", "give a single 3-D volume")
    if not int(header["sform_code"]) and not int(header["qform_code"]):
        raise Unreadable(
            "the file does not say how it lies in the patient (sform and qform codes are 0)",
            "convert the series anew with a tool that keeps the orientation",
        )
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise Unreadable(f"its lengths are in {unit}", "write it in millimetres")
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    steps = [f"HU = stored * {slope:g} + {intercept:g}"]
    hu = to_int16(stored * slope + intercept, steps)
    return [to_reading(hu, affine, part, steps)]
