"""PNG, JPEG, TIFF and BMP images: fundus photographs, radiographs, tiles of tissue.

A JPEG keeps its compressed picture, bit for bit, but loses everything that cameras and software
write beside it (EXIF, XMP, comments), where names and dates stand. Everything else is stored as
PNG, losslessly, without the file's metadata.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.readers.common import Reading, Unreadable, one_line, slices

PACKAGES = ("pillow", "imagecodecs")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_AGAIN = "fetch the file again, or export it anew from its origin"
_ORIENTATION = 0x0112  # EXIF


def read(path: Path, part: str = "") -> list[Reading]:
    """One sample; ``part`` cuts it to ``rows,columns``, such as ``0:512,100:612``."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    raw = path.read_bytes()
    image: Any
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        image.load()
    except UnidentifiedImageError:
        raise Unreadable(
            f"not an image in one of the formats {', '.join(FORMATS)}", _AGAIN
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Unreadable(f"the image cannot be decoded: {one_line(error)}", _AGAIN) from None
    if getattr(image, "n_frames", 1) > 1:
        raise Unreadable(
            f"the file holds {image.n_frames} images",
            "save the one that is meant as its own file",
        )
    turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    steps = []
    if image.format == "JPEG":
        bare = strip_jpeg(raw)
        _check_jpeg(bare)
        if not (turned or part) and image.mode in ("L", "RGB"):
            steps.append("JPEG kept as it is, its metadata removed")
            return [Reading(encoded=("jpg", bare), steps=steps)]
    if turned:
        image = ImageOps.exif_transpose(image)
        steps.append("turned as EXIF says")
    array = _pixels(image, steps)
    cut = slices(part, array.shape[:2], "pixels (rows,columns)")
    if cut:
        array = array[tuple(slice(*ends) for ends in cut)]
    if array.min() == array.max():
        raise Unreadable(f"every pixel has the value {array.min()}", _AGAIN)
    where: dict[str, Any] = {"part": part} if part else {}
    return [Reading(array=array, part="cut" if part else "", steps=steps, where=where)]


def _pixels(image: Any, steps: list[str]) -> NDArray[Any]:
    """uint8 grey or RGB, or uint16 grey."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bit, which Pillow hands out as I;16 or as I
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise Unreadable(
                f"pixels from {array.min()} to {array.max()} do not fit 16 bit",
                "save it with 8 or 16 bit a pixel",
            )
        return array.astype(np.uint16)
    if image.mode in ("L", "RGB"):
        return np.asarray(image)
    if image.mode == "1":
        raise Unreadable("the image is black and white only (1 bit)", "give one with grey values")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        steps.append("transparent parts made black")
    elif image.mode not in ("P", "CMYK", "YCbCr"):
        raise Unreadable(f"pixels of the kind {image.mode} are not read", "save it as RGB or grey")
    steps.append(f"{image.mode} to RGB")
    return np.asarray(image.convert("RGB"))


def strip_jpeg(raw: bytes) -> bytes:
    """The same JPEG without comments, application data and whatever follows its end.

    JFIF (APP0) and Adobe's colour transform (APP14) stay: without them colours would change.
    Raises Unreadable where its structure is damaged.
    """
    kept, at = [raw[:2]], 2
    while at + 4 <= len(raw):
        if raw[at] != 0xFF:
            raise Unreadable(
                f"the JPEG is damaged at byte {at}: no marker where one is due", _AGAIN
            )
        marker = raw[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
        private = marker == 0xFE or (0xE0 <= marker <= 0xEF and marker not in (0xE0, 0xEE))
        if not private:
            kept.append(raw[at:end])
        at = end
        if marker == 0xDA:  # the scan's data last until the next marker that is not RSTn
            while True:
                found = raw.find(b"\xff", end)
                if found < 0 or found + 1 >= len(raw):
                    raise Unreadable("the JPEG ends before its end marker: it was cut", _AGAIN)
                if raw[found + 1] == 0 or 0xD0 <= raw[found + 1] <= 0xD7 or raw[found + 1] == 0xFF:
                    end = found + (1 if raw[found + 1] == 0xFF else 2)
                    continue
                break
            kept.append(raw[at:found])
            at = found
            if raw[found + 1] == 0xD9:
                return b"".join([*kept, b"\xff\xd9"])
    raise Unreadable("the JPEG ends before its end marker: it was cut", _AGAIN)


def _check_jpeg(raw: bytes) -> None:
    """Refuse compressed data that no encoder writes.

    Decoders conceal such damage as grey or shifted blocks; a lossless transcoder has to
    understand every bit. (Damage that happens to be valid data remains: only a checksum from
    the file's origin would find it.)
    """
    import imagecodecs

    try:
        imagecodecs.jpegxl_encode_jpeg(raw)
    except imagecodecs.JpegxlError:
        raise Unreadable(
            "the JPEG's compressed data are damaged, or not of a kind in common use",
            _AGAIN + "; if it looks right in a viewer, save it as PNG",
        ) from None
