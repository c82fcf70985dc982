"""Readers: one file of a hospital or a data set in, samples out. One module a format.

Each module has ``read(path, part) -> list[Reading]``, which raises `common.Unreadable`, the
``PACKAGES`` that it reads with, and, where a sample is more than one file, ``files(path)``.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from m3bind.data.readers.common import Unreadable

SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms", ".vmu", ".svslide", ".qptiff")
_LARGE_TIFF = 2048  # pixels; from here on a TIFF of tissue is a slide to be cut into tiles


def reader_for(path: Path, modality: str, kind: str) -> ModuleType:
    """The reader of a file, by what is wanted of it and by its form; raises Unreadable."""
    return import_module(f"{__name__}.{_choose(path, modality, kind)}")


def _choose(path: Path, modality: str, kind: str) -> str:
    name = path.name.lower()
    if kind == "signal" and not is_dicom(path):
        from m3bind.data.readers.ecg_wfdb import header

        if header(path).is_file():
            return "ecg_wfdb"
    if not path.exists():
        raise Unreadable("there is no such file", "correct the path, or fetch the file")
    if kind == "volume" and path.is_dir():
        return "ct_dicom"
    if not path.is_file():
        raise Unreadable("the path is a folder", "name a file (only a CT series is a folder)")
    if path.stat().st_size == 0:
        raise Unreadable("the file is empty (0 bytes)", "fetch the file again")
    dicom = is_dicom(path)
    if kind == "volume":
        if name.endswith((".nii", ".nii.gz")):
            return "ct_nifti"
        if dicom:
            return "ct_dicom"
        raise Unreadable("neither DICOM nor NIfTI", "give a folder of DICOM slices, or .nii(.gz)")
    if kind == "signal":
        if dicom:
            return "ecg_dicom"
        raise Unreadable("neither DICOM nor WFDB", "give a DICOM waveform, or a WFDB header (.hea)")
    if dicom:
        return "dicom_image"
    return "slide" if modality == "pathology" and _is_slide(path) else "image"


def is_dicom(path: Path) -> bool:
    """Whether the file says that it is DICOM, by its name or by its first bytes."""
    if path.suffix.lower() in (".dcm", ".dicom"):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _is_slide(path: Path) -> bool:
    if path.name.lower().endswith(SLIDE_SUFFIXES):
        return True
    if path.suffix.lower() not in (".tif", ".tiff"):
        return False
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            return max(page.imagewidth, page.imagelength) >= _LARGE_TIFF
    except Exception:  # the image reader will say what is wrong with it
        return False
