"""Examinations drawn as a physician reads them: ECG on grid paper, CT in windows, images as such.

Every function returns HTML (an ``<svg>`` or ``<img>`` with its data inside), with a text for
those who cannot see it.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from m3bind.data.constants import LEADS

__all__ = ["WINDOWS", "draw", "draw_ct", "draw_ecg", "draw_image"]

WINDOWS = {"lung": (-600.0, 1500.0), "mediastinal": (40.0, 400.0)}  # level, width in HU

_MM_PER_S, _MM_PER_MV = 25.0, 10.0
_ROW, _MARGIN, _PULSE = 24.0, 5.0, 9.0  # mm: least height of a row, border, calibration


def draw(record: Any, *, alt: str = "", large: bool = False) -> str:
    """Any record (``m3bind.data.records.Record``) in the way of its kind."""
    array = record.array()
    note = "SIMULATED" if record.simulated else ""
    if record.kind == "signal":
        return draw_ecg(array, rate_hz=record.rate_hz or 500, alt=alt, note=note)
    if record.kind == "volume":
        spacing = record.spacing_mm or (1.0, 1.0, 1.0)
        return draw_ct(array, spacing, alt=alt, note=note, large=large)
    return draw_image(array, alt=alt, size=480 if large else 320)


def draw_ecg(
    microvolt: np.ndarray,  # [12, T] in LEADS order
    *,
    rate_hz: int = 500,
    alt: str = "",
    note: str = "",
) -> str:
    """12-lead ECG, 25 mm/s and 10 mm/mV: four columns of three leads, and lead II as the rhythm.

    The columns are successive quarters of the recording, as on paper: time runs on from left to
    right. A user unit of the SVG is a millimetre; the rows stand as far apart as tall complexes
    need. Raises ``ValueError`` for another shape.
    """
    if microvolt.ndim != 2 or microvolt.shape[0] != len(LEADS):
        raise ValueError(f"an ECG must be [12, T], got {microvolt.shape}")
    step = max(1, round(rate_hz / 250))  # 250 Hz is 0.1 mm on paper
    trace = microvolt[:, ::step].astype(np.float64) / 1000.0 * _MM_PER_MV
    per_mm = rate_hz / step / _MM_PER_S  # samples a millimetre
    seconds = microvolt.shape[1] / rate_hz
    quarter = trace.shape[1] // 4
    rows = [
        [(3 * c + r, slice(c * quarter, (c + 1) * quarter)) for c in range(4)] for r in range(3)
    ]
    rows.append([(1, slice(None))])
    bases, high = _baselines([[trace[lead, part] for lead, part in row] for row in rows])
    wide = _MARGIN * 2 + _PULSE + seconds * _MM_PER_S
    wide, high = 5 * np.ceil(wide / 5), 5 * np.ceil(high / 5)
    out = [
        f'<svg class="ecg" viewBox="0 0 {wide:g} {high:g}" role="img" aria-label="{escape(alt)}">'
        f'<rect width="{wide:g}" height="{high:g}" fill="#fff8f6"/>'
        f'<path d="{_grid(wide, high, 1)}" stroke="#f6cfc8" stroke-width="0.12"/>'
        f'<path d="{_grid(wide, high, 5)}" stroke="#e79c90" stroke-width="0.22"/>'
    ]
    left = _MARGIN + _PULSE
    for base, row in zip(bases, rows, strict=True):
        pulse = f"M{_MARGIN} {base:g}h1.5v-10h5v10h1.5"
        out.append(f'<path d="{pulse}" class="w"/>')
        for column, (lead, part) in enumerate(row):
            x = left + column * quarter / per_mm
            out.append(f'<path d="{_trace(trace[lead, part], x, base, per_mm)}" class="w"/>')
            if column:
                out.append(f'<path d="M{x:g} {base - 4:g}v8" stroke="#555" stroke-width="0.3"/>')
            out.append(f'<text x="{x + 1.2:g}" y="{base - 8.5:g}" class="n">{LEADS[lead]}</text>')
    out.append(
        f'<text x="{wide - _MARGIN:g}" y="{high - 1.5:g}" class="s">'
        f"{escape(note)} &#160; 25 mm/s &#160; 10 mm/mV</text>"
    )
    return "".join(out) + "</svg>"


def _baselines(rows: Sequence[Sequence[np.ndarray]]) -> tuple[list[float], float]:
    """Where each row's zero lies, in mm from the top, and the height of the paper."""
    above = [max(0.0, *(float(p.max(initial=0)) for p in row)) for row in rows]
    below = [max(0.0, *(-float(p.min(initial=0)) for p in row)) for row in rows]
    bases = [_MARGIN + max(13.0, above[0] + 1)]
    for up, down in zip(above[1:], below, strict=False):
        # tall R and deep S waves rarely meet at one time: on paper they may overlap a little
        bases.append(round(bases[-1] + min(max(_ROW, 0.85 * (up + down)), 1.6 * _ROW), 2))
    return bases, bases[-1] + max(10.0, below[-1] + 1) + _MARGIN


def _grid(wide: float, high: float, step: int) -> str:
    # the fine grid leaves out what the coarse one draws
    skip = 5 if step == 1 else 0
    across = [
        f"M{x} 0v{high:g}" for x in range(0, int(wide) + 1, step) if not (skip and x % 5 == 0)
    ]
    down = [f"M0 {y}h{wide:g}" for y in range(0, int(high) + 1, step) if not (skip and y % 5 == 0)]
    return "".join(across + down)


def _trace(millimetre: np.ndarray, x: float, base: float, per_mm: float) -> str:
    """A path in relative steps of 0.01 mm, which is short to write and finer than any printer."""
    y = np.round((base - millimetre) * 100).astype(int)
    at = np.round((x + np.arange(len(y)) / per_mm) * 100).astype(int)
    steps = "".join(
        f"l{dx / 100:g} {dy / 100:g}"
        for dx, dy in zip(np.diff(at).tolist(), np.diff(y).tolist(), strict=True)
    )
    return f"M{at[0] / 100:g} {y[0] / 100:g}{steps}" if len(y) else ""


def draw_ct(
    hu: np.ndarray,  # int16 [D, H, W], cranio-caudal first
    spacing_mm: Sequence[float],  # z, y, x
    *,
    alt: str = "",
    note: str = "",
    large: bool = False,
) -> str:
    """Axial slices in the lung and the mediastinal window, and a coronal one, in true proportion.

    Five axial slices from 20 % to 70 % of the volume's height, head first, and the coronal
    through its middle; ``large`` puts them in one row a window, otherwise in two. Grey values
    outside a window are black or white, as at a console. The patient's right is on the left.
    """
    from PIL import Image, ImageDraw, ImageFont

    if hu.ndim != 3:
        raise ValueError(f"a CT must be [D, H, W], got {hu.shape}")
    z, y, x = (float(v) for v in spacing_mm)
    depth, height = hu.shape[:2]
    panel, gap, strip = (172, 3, 21) if large else (150, 3, 21)
    font = ImageFont.load_default(size=14)
    across = 6 if large else 3
    sheets = []
    for name, (level, width) in WINDOWS.items():
        tiles = [
            _tile(hu[round(f * (depth - 1))], (level, width), (y, x), panel, f"{f * 100:.0f} %")
            for f in (0.2, 0.32, 0.44, 0.56, 0.7)
        ]
        tiles.append(_tile(hu[:, height // 2], (level, width), (z, x), panel, "coronal"))
        tall = max(tile.size[1] for tile in tiles) + gap
        sheet = Image.new("L", ((panel + gap) * across - gap, strip + tall * (6 // across)), 0)
        text = f"{name} window (L {level:g}, W {width:g} HU)  {note}"
        ImageDraw.Draw(sheet).text((4, 2), text, fill=235, font=font)
        for i, tile in enumerate(tiles):
            row, column = divmod(i, across)
            top = strip + row * tall + (tall - gap - tile.size[1]) // 2
            sheet.paste(tile, (column * (panel + gap), top))
        sheets.append(sheet)
    joined = Image.new("L", (sheets[0].size[0], sum(s.size[1] for s in sheets)), 0)
    top = 0
    for sheet in sheets:
        joined.paste(sheet, (0, top))
        top += sheet.size[1]
    return _img(joined, alt, "ct")


def _tile(
    plane: np.ndarray,
    window: tuple[float, float],
    spacing: tuple[float, float],
    width: int,
    text: str,
) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    level, span = window
    grey = np.clip((plane.astype(np.float32) - (level - span / 2)) / span, 0, 1) * 255
    height = round(width * plane.shape[0] * spacing[0] / (plane.shape[1] * spacing[1]))
    tile = Image.fromarray(grey.astype(np.uint8)).resize(
        (width, max(height, 1)), Image.Resampling.BICUBIC
    )
    ImageDraw.Draw(tile).text(
        (4, max(height, 1) - 18), text, fill=235, font=ImageFont.load_default(size=13),
        stroke_width=2, stroke_fill=0,
    )  # fmt: skip
    return tile


def draw_image(array: np.ndarray, *, alt: str = "", size: int = 320) -> str:
    """A radiograph, fundus or slide tile, uint8 or uint16, [H, W] or [H, W, 3], never upscaled.

    16-bit radiographs are stretched between their 0.5 and 99.5 percentiles.
    """
    from PIL import Image

    plane = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if plane.dtype != np.uint8:
        low, high = np.percentile(plane, [0.5, 99.5])
        plane = (np.clip((plane - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(plane)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return _img(image, alt, "photo")


def _img(image: Any, alt: str, css: str) -> str:
    buffer = io.BytesIO()
    if image.mode == "L":
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        # colour photographs: a tenth of PNG's size without a difference that one could see
        image.convert("RGB").save(buffer, "JPEG", quality=92, subsampling=0)
        kind = "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img class="{css}" alt="{escape(alt)}" width="{image.width}" height="{image.height}" '
        f'src="data:image/{kind};base64,{data}">'
    )
