"""Whole slides (SVS, NDPI, pyramidal TIFF, ...): tiles of tissue, 224 pixels of 0.5 micrometres.

At most `common.MAX_PARTS` tiles a slide, evenly spread: a model learns more of many slides than of
every tile of few, and all carry the slide's one report. To take others, name regions in the
manifest's column ``part``, a line each.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.readers.common import Reading, Unreadable, one_line, slices, thin

PACKAGES = ("tiffslide", "tifffile", "imagecodecs", "pillow")
TILE, MPP = 224, 0.5
TISSUE = 0.5  # the share of a tile that must be tissue
_NEAR = 0.05  # a slide this close to MPP is not resampled
_COARSE = 1.25  # one of pixels this much larger is refused: nuclei would be invented
_CELL = 16  # samples along a tile's side where the share of tissue is estimated
_WHITE, _COLOUR, _BLACK = 235, 15, 20


def tissue_mask(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Stained pixels: not white, not black (pen, edge of the scan), not grey."""
    high, low = rgb.max(-1).astype(int), rgb.min(-1).astype(int)
    return (high - low >= _COLOUR) & (low < _WHITE) & (high > _BLACK)


def read(path: Path, part: str = "") -> list[Reading]:
    """The tiles; ``part`` is ``rows,columns`` of the finest level, within which they are taken."""
    import tiffslide

    try:
        slide = tiffslide.TiffSlide(path)
    except Exception as error:  # tiffslide and tifffile raise many kinds for a damaged slide
        reason = f"it cannot be opened as a slide: {one_line(error).replace(str(path), path.name)}"
        raise Unreadable(reason, "fetch the file again") from None
    with slide:
        try:
            own = float(slide.properties.get("tiffslide.mpp-x") or 0)
        except ValueError:
            own = 0.0
        if own <= 0:
            raise Unreadable(
                "the slide does not tell its micrometres a pixel",
                "write the resolution into the file, or give tiles of a known size as PNG",
            )
        scale = 1.0 if abs(MPP / own - 1) <= _NEAR else MPP / own
        if scale < 1 / _COARSE:
            raise Unreadable(
                f"its {own:.2f} micrometres a pixel are too coarse", f"{MPP} or finer is needed"
            )
        places = _places(slide, round(TILE * scale), part)
        level = slide.get_best_level_for_downsample(max(1.0, scale * 1.001))
        return [_tile(slide, place, level, scale, own, len(places), part) for place in thin(places)]


def _places(slide: Any, side: int, part: str) -> list[tuple[int, int]]:
    """(top, left) of the tiles of a regular grid that hold enough tissue, row by row."""
    width, height = slide.dimensions
    region = slices(part, (height, width), "pixels (rows,columns)")
    top, bottom = region[0] if region else (0, height)
    left, right = region[1] if len(region) > 1 else (0, width)
    level = slide.get_best_level_for_downsample(max(1.0, side / _CELL))
    factor = slide.level_downsamples[level]
    small = _region(slide, (0, 0), level, slide.level_dimensions[level])
    mask = tissue_mask(np.asarray(small))
    found = []
    for y in range(top, bottom - side + 1, side):
        rows = mask[int(y / factor) : max(int(y / factor) + 1, round((y + side) / factor))]
        for x in range(left, right - side + 1, side):
            cell = rows[:, int(x / factor) : max(int(x / factor) + 1, round((x + side) / factor))]
            if cell.size and cell.mean() >= TISSUE:
                found.append((y, x))
    if not found:
        raise Unreadable(
            f"no tile of {side} pixels holds {TISSUE:.0%} tissue", "look at the slide (or the part)"
        )
    return found


def _tile(
    slide: Any, place: tuple[int, int], level: int, scale: float, own: float, count: int, part: str
) -> Reading:
    from PIL import Image

    (y, x), side = place, max(1, round(TILE * scale / slide.level_downsamples[level]))
    tile = _region(slide, (x, y), level, (side, side))
    steps = [f"level {level}"]
    if side != TILE:
        tile = tile.resize((TILE, TILE), Image.Resampling.LANCZOS)
        steps.append(f"{side} to {TILE} pixels")
    where: dict[str, Any] = {"x": x, "y": y, "mpp": own * scale, "slide_mpp": own, "tiles": count}
    return Reading(
        array=np.asarray(tile),
        part=f"x{x}y{y}",
        steps=steps,
        where=where | ({"part": part} if part else {}),
    )


def _region(slide: Any, place: tuple[int, int], level: int, size: tuple[int, int]) -> Any:
    try:
        return slide.read_region(place, level, size).convert("RGB")
    except Exception as error:
        reason = f"a part of the slide cannot be decoded: {one_line(error)}"
        raise Unreadable(reason, "fetch the file again") from None
