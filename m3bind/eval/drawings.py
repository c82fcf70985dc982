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

__all__ = ["LEADS", "WINDOWS", "draw", "draw_ct", "draw_ecg", "draw_image"]

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
WINDOWS = {"lung": (-600.0, 1500.0), "mediastinum": (40.0, 400.0)}  # level, width in HU

_MM_PER_S, _MM_PER_MV = 25.0, 10.0
_ROW, _MARGIN, _PULSE = 27.0, 5.0, 9.0  # mm: height of a row, border, room for the calibration


def draw(record: Any, *, alt: str = "", large: bool = False) -> str:
    """Any record (``m3bind.data.records.Record``) in the way of its kind."""
    array = record.array()
    if record.kind == "signal":
        return draw_ecg(array, rate_hz=record.rate_hz or 500, alt=alt)
    if record.kind == "volume":
        return draw_ct(array, record.spacing_mm or (1.0, 1.0, 1.0), alt=alt, large=large)
    return draw_image(array, alt=alt, size=480 if large else 320)


def draw_ecg(
    microvolt: np.ndarray,  # [12, T] in LEADS order
    *,
    rate_hz: int = 500,
    alt: str = "",
) -> str:
    """12-lead ECG, 25 mm/s and 10 mm/mV: four columns of three leads, and lead II as the rhythm.

    The columns are successive quarters of the recording, as on paper: time runs on from left to
    right. A user unit of the SVG is a millimetre. Raises ``ValueError`` for another shape.
    """
    if microvolt.ndim != 2 or microvolt.shape[0] != len(LEADS):
        raise ValueError(f"an ECG must be [12, T], got {microvolt.shape}")
    step = max(1, round(rate_hz / 250))  # 250 Hz is 0.1 mm on paper
    trace = microvolt[:, ::step].astype(np.float64) / 1000.0 * _MM_PER_MV
    per_mm = rate_hz / step / _MM_PER_S  # samples a millimetre
    seconds = microvolt.shape[1] / rate_hz
    quarter = trace.shape[1] // 4
    wide = _MARGIN * 2 + _PULSE + seconds * _MM_PER_S
    high = _MARGIN * 2 + 4 * _ROW
    wide, high = 5 * np.ceil(wide / 5), 5 * np.ceil(high / 5)
    out = [
        f'<svg class="ecg" viewBox="0 0 {wide:g} {high:g}" role="img" aria-label="{escape(alt)}">'
        f'<rect width="{wide:g}" height="{high:g}" fill="#fff8f6"/>'
        f'<path d="{_grid(wide, high, 1)}" stroke="#f6cfc8" stroke-width="0.12"/>'
        f'<path d="{_grid(wide, high, 5)}" stroke="#e79c90" stroke-width="0.22"/>'
    ]
    left = _MARGIN + _PULSE
    for row in range(4):
        base = _MARGIN + _ROW * (row + 0.5)
        pulse = f"M{_MARGIN} {base:g}h1.5v-10h5v10h1.5"
        out.append(f'<path d="{pulse}" class="w"/>')
        for column in range(4 if row < 3 else 1):
            lead = 3 * column + row if row < 3 else 1
            part = slice(column * quarter, (column + 1) * quarter) if row < 3 else slice(None)
            x = left + column * quarter / per_mm
            out.append(f'<path d="{_trace(trace[lead, part], x, base, per_mm)}" class="w"/>')
            if column:
                out.append(f'<path d="M{x:g} {base - 4:g}v8" stroke="#555" stroke-width="0.3"/>')
            out.append(f'<text x="{x + 1.2:g}" y="{base - 8.5:g}" class="n">{LEADS[lead]}</text>')
    out.append(
        f'<text x="{wide - _MARGIN:g}" y="{high - 1.5:g}" class="s">25 mm/s &#160; 10 mm/mV</text>'
    )
    return "".join(out) + "</svg>"


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
    large: bool = False,
) -> str:
    """Axial slices in the lung and the mediastinal window, and a coronal one, in true proportion.

    Axial slices at a third, a half and two thirds of the volume's height (``large``: five), the
    coronal through its middle. Grey values outside a window are black or white, as at a console.
    """
    if hu.ndim != 3:
        raise ValueError(f"a CT must be [D, H, W], got {hu.shape}")
    z, y, x = (float(v) for v in spacing_mm)
    depth, height = hu.shape[:2]
    fractions = (0.2, 0.35, 0.5, 0.65, 0.8) if large else (0.33, 0.5, 0.67)
    panel = 170
    rows = []
    for name, window in WINDOWS.items():
        tiles = [
            _tile(hu[int(f * (depth - 1))], window, (y, x), panel, f"axial {100 * f:.0f} %")
            for f in fractions
        ]
        tiles.append(_tile(hu[:, height // 2], window, (z, x), panel, "coronal"))
        level, width = window
        rows.append((f"{name}, L {level:g} W {width:g} HU", tiles))
    gap, strip = 3, 15
    tall = max(t.size[1] for _, tiles in rows for t in tiles)
    total = (panel + gap) * len(rows[0][1]) - gap
    from PIL import Image, ImageDraw

    sheet = Image.new("L", (total, len(rows) * (tall + strip)), 0)
    pen = ImageDraw.Draw(sheet)
    for r, (text, tiles) in enumerate(rows):
        top = r * (tall + strip)
        pen.text((3, top + 2), text, fill=225)
        for c, tile in enumerate(tiles):
            sheet.paste(tile, (c * (panel + gap), top + strip + (tall - tile.size[1]) // 2))
    return _img(sheet, alt, "ct")


def _tile(
    plane: np.ndarray,
    window: tuple[float, float],
    spacing: tuple[float, float],
    width: int,
    text: str,
) -> Any:
    from PIL import Image, ImageDraw

    level, span = window
    grey = np.clip((plane.astype(np.float32) - (level - span / 2)) / span, 0, 1) * 255
    height = round(width * plane.shape[0] * spacing[0] / (plane.shape[1] * spacing[1]))
    tile = Image.fromarray(grey.astype(np.uint8)).resize((width, max(height, 1)), Image.BICUBIC)
    ImageDraw.Draw(tile).text((3, max(height, 1) - 13), text, fill=200)
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
    image.thumbnail((size, size), Image.LANCZOS)
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
