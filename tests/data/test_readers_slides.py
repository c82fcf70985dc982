"""Tiles of slides: where they lie, at which scale, and only where there is tissue."""

import numpy as np
import pytest
import tifffile

from m3bind.data.readers import common, reader_for
from m3bind.data.readers.common import Unreadable


def read(path, part=""):
    return reader_for(path, "pathology", "image2d").read(path, part)


def refuse(path, words, part=""):
    with pytest.raises(Unreadable, match=words) as caught:
        read(path, part)
    assert caught.value.remedy and "\n" not in caught.value.reason


def tissue(height=2100, width=2300):
    """White glass; pink tissue, whose blue tells the place, in rows 448:1344, columns 224:1120."""
    slide = np.full((height, width, 3), 245, np.uint8)
    y, x = np.mgrid[448:1344, 224:1120]
    slide[448:1344, 224:1120] = np.stack(
        [y * 0 + 200, y * 0 + 100, 120 + (y // 8 + x // 8) % 99], -1
    )
    slide[1500:1900, 1500:2200] = 5  # pen, or the edge of the scan
    return slide


def write(path, slide, mpp=0.5, levels=2):
    values = {"tile": (256, 256), "photometric": "rgb", "compression": "deflate"}
    if mpp:
        values |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        file.write(slide, subifds=levels - 1, **values)
        for level in range(1, levels):
            values |= {"resolution": (1e4 / mpp / 2**level,) * 2} if mpp else {}
            file.write(slide[:: 2**level, :: 2**level], subfiletype=1, **values)
    return path


def test_tiles_of_tissue_at_their_place(tmp_path) -> None:
    slide = tissue()
    readings = read(write(tmp_path / "a.tif", slide))
    places = {(r.where["y"], r.where["x"]) for r in readings}
    assert places == {(y, x) for y in range(448, 1344, 224) for x in range(224, 1120, 224)}
    for reading in readings:
        y, x = reading.where["y"], reading.where["x"]
        np.testing.assert_array_equal(reading.array, slide[y : y + 224, x : x + 224])
        assert reading.where["mpp"] == pytest.approx(0.5)
    assert len({r.part for r in readings}) == 16


def test_a_finer_slide_is_brought_to_half_a_micrometre(tmp_path) -> None:
    slide = tissue()
    readings = read(write(tmp_path / "a.tif", slide, mpp=0.25))
    assert {(r.where["y"], r.where["x"]) for r in readings} == {
        (y, x) for y in (448, 896) for x in (0, 448, 896)
    } - {(y, 896) for y in (448, 896) if (slide[y : y + 448, 896:1344, 2] < 230).mean() < 0.5}
    inner = next(r for r in readings if (r.where["y"], r.where["x"]) == (448, 448))
    assert inner.array.shape == (224, 224, 3) and inner.where["mpp"] == pytest.approx(0.5)
    truth = slide[448:896:2, 448:896:2].astype(int)
    assert np.abs(inner.array.astype(int) - truth).mean() < 2


def test_part_and_thinning(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "a.tif", tissue())
    readings = read(path, "500:1000,300:800")
    assert {(r.where["y"], r.where["x"]) for r in readings} == {
        (y, x) for y in (500, 724) for x in (300, 524)
    }
    monkeypatch.setattr(common, "MAX_PARTS", 5)
    readings = read(path)
    assert len(readings) == 5 and readings[0].where["tiles"] == 16


def test_slides_that_are_refused(tmp_path) -> None:
    slide = tissue()
    refuse(write(tmp_path / "a.tif", slide, mpp=None), "micrometres a pixel")
    refuse(write(tmp_path / "b.tif", slide, mpp=1.0), "too coarse")
    refuse(write(tmp_path / "c.tif", np.full_like(slide, 240)), "no tile")
    (tmp_path / "d.svs").write_bytes(b"not a slide" * 50)
    refuse(tmp_path / "d.svs", "cannot be opened as a slide")
    whole = write(tmp_path / "e.tif", slide)
    refuse(whole, "within 0:2300", "0:500,0:2301")


def test_a_small_tiff_is_a_tile(tmp_path) -> None:
    tile = tissue()[448:672, 224:448]
    tifffile.imwrite(tmp_path / "a.tif", tile)
    (reading,) = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(reading.array, tile)
