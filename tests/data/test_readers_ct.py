"""CT: Hounsfield units against pydicom and nibabel, orientation, series that are not whole."""

import nibabel as nib
import numpy as np
import pydicom
import pytest

from m3bind.data.readers import reader_for
from m3bind.data.readers.common import Unreadable
from m3bind.data.readers.volumes import hounsfield_fault

from medical_files import body, ct_slice  # isort: skip


def read(path, part=""):
    (reading,) = reader_for(path, "ct", "volume").read(path, part)
    return reading


def refuse(path, words, part=""):
    with pytest.raises(Unreadable, match=words) as caught:
        read(path, part)
    assert caught.value.remedy and "\n" not in caught.value.reason


def series(folder, hu, slope=1, intercept=-1024, gap=2.5, leave=(), **values):
    """Axial slices, the first of ``hu`` topmost, in files whose names tell nothing of the order."""
    folder.mkdir(exist_ok=True)
    for index, slice_hu in enumerate(hu):
        if index not in leave:
            stored = np.rint((slice_hu.astype(float) - intercept) / slope).astype(np.int16)
            ct_slice(
                folder / f"{(index * 7) % 11:02d}.dcm", stored, (-10.0, 20.0, 900.0 - gap * index),
                RescaleSlope=slope, RescaleIntercept=intercept, **values,
            )  # fmt: skip
    return folder


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (2, -1000), (0.5, -512.5)])
def test_series_as_pydicom_gives_it(tmp_path, slope, intercept) -> None:
    folder = series(tmp_path / "s", body() // 4 * 4, slope, intercept)
    reading = read(folder)
    slices = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    truth = np.stack([pydicom.pixels.apply_rescale(d.pixel_array, d) for d in slices[::-1]])
    np.testing.assert_array_equal(reading.array, np.rint(truth))
    assert reading.array.dtype == np.int16
    assert reading.spacing_mm == (2.5, 0.8, 0.7)


def test_patients_who_lie_otherwise_come_out_the_same(tmp_path) -> None:
    hu = body()
    truth = read(series(tmp_path / "supine", hu)).array
    np.testing.assert_array_equal(truth, hu)
    folder = tmp_path / "prone"  # rows and columns run the other way
    folder.mkdir()
    for index, slice_hu in enumerate(hu):
        ct_slice(
            folder / f"{index}", slice_hu[::-1, ::-1] + 1024, (25.0, 30.0, -3.0 * index),
            orientation=(-1, 0, 0, 0, -1, 0),
        )  # fmt: skip
    np.testing.assert_array_equal(read(folder).array, truth)


def test_padding_becomes_air(tmp_path) -> None:
    hu = body()
    hu[:, :3] = -2000 - 1024
    reading = read(series(tmp_path / "s", hu, PixelPaddingValue=-2000))
    assert (reading.array[:, :3] == -1024).all()
    np.testing.assert_array_equal(reading.array[:, 3:], hu[:, 3:])


def test_series_that_are_not_whole(tmp_path) -> None:
    hu = body()
    refuse(series(tmp_path / "a", hu, leave=(3,)), "missing: 5.00 mm")
    double = series(tmp_path / "b", hu)
    (double / "copy.dcm").write_bytes((double / "00.dcm").read_bytes())
    refuse(double, "stand twice")
    two = series(tmp_path / "c", hu)
    ct_slice(two / "x.dcm", hu[0] + 1024, (0, 0, 0), series="9.9")
    refuse(two, "2 series")
    cut = series(tmp_path / "d", hu)
    (cut / "00.dcm").write_bytes((cut / "00.dcm").read_bytes()[:-90])
    refuse(cut, "cannot be decoded")
    bare = tmp_path / "e"
    bare.mkdir()
    refuse(bare, "no DICOM file")
    tilted = tmp_path / "f"
    tilted.mkdir()
    for index in range(4):
        ct_slice(tilted / f"{index}.dcm", hu[index] + 1024, (0, 1.5 * index, 3.0 * index))
    refuse(tilted, "tilted")
    no_hu = series(tmp_path / "g", hu)
    data = pydicom.dcmread(no_hu / "00.dcm")
    del data.RescaleIntercept
    data.save_as(no_hu / "00.dcm")
    refuse(no_hu, "HU are unknown")


def test_localizers_are_left_out(tmp_path) -> None:
    hu = body()
    folder = series(tmp_path / "s", hu)
    ct_slice(
        folder / "scout.dcm", hu[0] + 1024, (0, 0, 0), (0, 1, 0, 0, 0, -1),
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )  # fmt: skip
    np.testing.assert_array_equal(read(folder).array, hu)


def test_single_slice_only_where_it_is_asked_for(tmp_path) -> None:
    hu = body()
    path = ct_slice(tmp_path / "a.dcm", hu[0] + 1024, (0, 0, 0), SliceThickness=5)
    refuse(path, "not a volume")
    reading = read(path, "0:1")
    np.testing.assert_array_equal(reading.array, hu[:1])
    assert reading.spacing_mm == (5.0, 0.8, 0.7)


def nifti(path, hu, codes="LPS", slope=None, intercept=None, zooms=(0.7, 0.8, 2.5), dtype=np.int16):
    """A volume [D, H, W] (head first) as NIfTI [x, y, z] whose axes run as ``codes`` say."""
    spatial = hu.transpose(2, 1, 0)[:, :, ::-1]  # to left, to posterior, to superior
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(codes)
    )
    affine = np.diag([-zooms[0], -zooms[1], zooms[2], 1.0])
    affine = affine @ nib.orientations.inv_ornt_aff(turn, spatial.shape)
    values = nib.orientations.apply_orientation(spatial, turn)
    image = nib.Nifti1Image(values.astype(dtype), affine)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "ASR", "PIR"])
def test_nifti_of_any_orientation(tmp_path, codes) -> None:
    hu = body()
    reading = read(nifti(tmp_path / "a.nii.gz", hu, codes))
    np.testing.assert_array_equal(reading.array, hu)
    assert reading.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    part = read(tmp_path / "a.nii.gz", "1:4,5:30,2:20")
    np.testing.assert_array_equal(part.array, hu[1:4, 5:30, 2:20])


def test_nifti_slope_and_intercept_as_nibabel(tmp_path) -> None:
    hu = body() // 2 * 2
    raw = (hu + 1000) // 2
    path = nifti(tmp_path / "a.nii", raw)
    image = nib.load(path)
    image.header.set_slope_inter(2, -1000)
    with path.open("r+b") as file:  # as converters write it: stored values and a scale
        file.seek(112)
        file.write(np.array([2, -1000], "<f4").tobytes())
    truth = np.asarray(nib.load(path).get_fdata())[:, :, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(read(path).array, truth)
    np.testing.assert_array_equal(truth, hu)


def test_nifti_that_is_refused(tmp_path) -> None:
    hu = body()
    whole = nifti(tmp_path / "a.nii.gz", hu).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "cut.nii.gz", "cannot be read")
    (tmp_path / "b.nii").write_bytes(b"no NIfTI at all" * 99)
    refuse(tmp_path / "b.nii", "cannot be read")
    broken = hu.astype(np.float32)
    broken[0, 0, 0] = np.nan
    refuse(nifti(tmp_path / "c.nii", broken, dtype=np.float32), "NaN")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), tmp_path / "d.nii")
    refuse(tmp_path / "d.nii", "shape")
    lost = nib.Nifti1Image(hu, None)
    lost.header["sform_code"] = lost.header["qform_code"] = 0
    nib.save(lost, tmp_path / "e.nii")
    refuse(tmp_path / "e.nii", "how it lies")
    refuse(nifti(tmp_path / "f.nii", hu - 1024), "rescaled twice")


# What scanners and archives write outside the field of view.
@pytest.mark.parametrize("padding", [None, -1024, -2000, -2048, -3024, -8192])
@pytest.mark.parametrize("clipped", [False, True])
def test_intensities_once_twice_never(padding, clipped) -> None:
    hu = body((8, 64, 64))
    if clipped:  # as archives that hold no values below -1000 do
        hu = np.maximum(hu, -1000)
    outside = np.hypot(*(np.indices((64, 64)) - 31.5)) > 32
    if padding is not None:
        hu[:, outside] = padding
    assert hounsfield_fault(hu) is None
    assert "rescaled twice" in hounsfield_fault(hu - 1024)
    kept = outside & (padding is not None and padding < -1200)  # scaling spares true padding
    assert "never" in hounsfield_fault(np.where(kept, hu, hu + 1024))


def test_parts_of_a_body_are_no_fault() -> None:
    hu = body((8, 64, 64))
    assert hounsfield_fault(hu[:, 20:44, 8:33]) is None  # mostly lung
    assert hounsfield_fault(hu[:, 20:40, 40:54]) is None  # soft tissue alone
    assert "no tissue" in hounsfield_fault(hu[:, :3, :3])
