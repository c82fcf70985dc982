"""Radiographs and photographs, against pydicom's and Pillow's own values."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from m3bind.data.readers import reader_for
from m3bind.data.readers.common import Unreadable

from medical_files import radiograph  # isort: skip


def read(path, part="", modality="xray"):
    return reader_for(path, modality, "image2d").read(path, part)


def refuse(path, words, **values):
    with pytest.raises(Unreadable, match=words) as caught:
        read(path, **values)
    assert caught.value.remedy and "\n" not in caught.value.reason


def stored(seed=0, high=4000, shape=(40, 30)):
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint16)


# pydicom's own display chain is the truth; its output spans [0, 2^16 - 1] for 16 stored bits
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_as_pydicom(tmp_path, photometric, function) -> None:
    path = radiograph(
        tmp_path / "a.dcm", stored(), photometric,
        WindowCenter=[1800, 9], WindowWidth=[2500, 9], VOILUTFunction=function,
    )  # fmt: skip
    data = pydicom.dcmread(path)
    truth = pydicom.pixels.apply_voi_lut(data.pixel_array, data)
    if photometric == "MONOCHROME1":
        truth = 65535 - truth
    (reading,) = read(path)
    assert reading.array.dtype == np.uint16
    np.testing.assert_allclose(reading.array, truth, atol=1)
    assert ("MONOCHROME1 inverted" in reading.steps) == (photometric == "MONOCHROME1")


def test_without_a_window_the_range_is_used_and_padding_is_black(tmp_path) -> None:
    values = stored(1) + 100
    values[:5] = 0
    path = radiograph(tmp_path / "a.dcm", values, "MONOCHROME1", PixelPaddingValue=0)
    (reading,) = read(path)
    inner = values[5:].astype(float)
    truth = 65535 * (inner.max() - inner) / (inner.max() - inner.min())
    np.testing.assert_allclose(reading.array[5:], truth, atol=1)
    assert not reading.array[:5].any()


def test_rescale_comes_before_the_window(tmp_path) -> None:
    path = radiograph(
        tmp_path / "a.dcm", stored(2), "MONOCHROME2", RescaleSlope=0.5, RescaleIntercept=-300,
        WindowCenter=500, WindowWidth=1200, VOILUTFunction="LINEAR_EXACT",
    )  # fmt: skip
    value = pydicom.dcmread(path).pixel_array * 0.5 - 300
    truth = np.clip((value - 500) / 1200 + 0.5, 0, 1) * 65535
    np.testing.assert_allclose(read(path)[0].array, truth, atol=1)


def test_voi_lut(tmp_path) -> None:
    values = stored(3, high=256)
    curve = (np.linspace(0, 1, 256) ** 2 * 4095).astype(np.uint16)
    item = Dataset()
    item.add_new(0x00283002, "US", [256, 0, 12])
    item.add_new(0x00283006, "OW", curve.tobytes())
    path = radiograph(tmp_path / "a.dcm", values, "MONOCHROME2", VOILUTSequence=Sequence([item]))
    np.testing.assert_allclose(read(path)[0].array, curve[values] / 4095 * 65535, atol=1)


def test_colour_dicom_and_part(tmp_path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    path = radiograph(tmp_path / "a.dcm", rgb, "RGB", Modality="OP")
    np.testing.assert_array_equal(read(path, modality="retina")[0].array, rgb)
    np.testing.assert_array_equal(read(path, "3:9,4:20")[0].array, rgb[3:9, 4:20])
    refuse(path, r"0:21.*within 0:20", part="0:21")
    refuse(path, "3 ranges", part="0:1,0:1,0:1")


def test_dicom_that_is_refused(tmp_path) -> None:
    whole = radiograph(tmp_path / "a.dcm", stored(), "MONOCHROME2").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-500])
    refuse(tmp_path / "cut.dcm", "pixels cannot be decoded")
    (tmp_path / "head.dcm").write_bytes(whole[:100])
    refuse(tmp_path / "head.dcm", "not a DICOM file|parsed")
    refuse(radiograph(tmp_path / "b.dcm", stored(), "MONOCHROME2", Modality="CT"), "is CT")
    path = radiograph(tmp_path / "c.dcm", stored(), "MONOCHROME2", BurnedInAnnotation="YES")
    refuse(path, "burned into")
    refuse(radiograph(tmp_path / "d.dcm", stored(high=1), "MONOCHROME2"), "same value")
    refuse(tmp_path / "none.dcm", "no such file")
    refuse(tmp_path, "folder")


def jpeg(array, **save) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", **save)
    return buffer.getvalue()


def smooth(seed=0, shape=(64, 80, 3)):
    small = np.random.default_rng(seed).integers(0, 256, (8, 10, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize(shape[1::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("save", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}])
def test_jpeg_keeps_its_picture_and_loses_its_metadata(tmp_path, save) -> None:
    exif = Image.Exif()
    exif[0x013B] = "Zebediah Quisling"  # artist
    content = jpeg(smooth(), exif=exif, comment=b"MRN-7741902", **save) + b"trailing MRN-7741902"
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    (reading,) = read(path)
    extension, payload = reading.encoded
    assert extension == "jpg"
    assert b"Quisling" not in payload and b"7741902" not in payload
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(payload))), np.asarray(Image.open(path))
    )


def test_jpeg_is_turned_upright(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(smooth(), exif=exif))
    (reading,) = read(path)
    np.testing.assert_array_equal(reading.array, np.rot90(np.asarray(Image.open(path)), -1))


def test_damaged_jpeg_is_refused(tmp_path) -> None:
    content = jpeg(smooth(1, (320, 400, 3)), quality=92)
    path = tmp_path / "a.jpg"
    path.write_bytes(content[: len(content) // 2])
    refuse(path, "cannot be decoded|was cut")
    path.write_bytes(content[:-2])
    refuse(path, "truncated|was cut")
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(range(40)) + content[middle + 40 :])
    Image.open(path).load()  # a decoder conceals it
    refuse(path, "data are damaged")
    path.write_bytes(b"this is text")
    refuse(path, "not an image")
    path.write_bytes(b"")
    refuse(path, "empty")


def test_png_of_every_depth(tmp_path) -> None:
    path = tmp_path / "a.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Zebediah Quisling")
    grey16 = stored(4, 65536)
    Image.fromarray(grey16).save(path, pnginfo=info)
    np.testing.assert_array_equal(read(path)[0].array, grey16)
    rgb = smooth(2)
    Image.fromarray(rgb).save(path)
    np.testing.assert_array_equal(read(path)[0].array, rgb)
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    alpha[:10, :, 3] = 0
    Image.fromarray(alpha).save(path)
    flat = rgb.copy()
    flat[:10] = 0
    np.testing.assert_array_equal(read(path)[0].array, flat)
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(path)
    np.testing.assert_array_equal(read(path)[0].array, np.asarray(palette.convert("RGB")))
    Image.fromarray(rgb[..., 0] > 99).save(path)
    refuse(path, "1 bit")
