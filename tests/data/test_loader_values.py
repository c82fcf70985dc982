"""What the loader makes of bytes, against Pillow, NumPy and arithmetic."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3bind.data.loader import Loader
from m3bind.data.preprocess import Preprocess
from m3bind.data.records import Record

from loader_cases import record, write  # isort: skip

pytest.importorskip("nvidia.dali")
RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (30, 44)).astype(np.uint8)
GREY16 = RNG.integers(0, 65536, (30, 44)).astype(np.uint16)
COLOUR = RNG.integers(0, 256, (30, 44, 3)).astype(np.uint8)
LUMA = np.array([0.299, 0.587, 0.114])


def load(root: Path, one: Record, preprocess: Preprocess) -> np.ndarray:
    write(root, [one])
    (batch,) = Loader(root, one.modality, one.split, preprocess, 4, train=False)
    return batch.images[0].numpy()


def image(channels: int, size: tuple[int, int] = (30, 44), **values) -> Preprocess:
    values = {"fit": "stretch", **values}
    return Preprocess(kind="image2d", size=size, channels=channels, **values)


@pytest.mark.parametrize(
    ("array", "channels", "expected"),
    [
        (GREY8, 1, GREY8[None] / 255),
        (GREY16, 1, GREY16[None] / 65535),
        (GREY8, 3, np.repeat(GREY8[None] / 255, 3, 0)),
        (GREY16, 3, np.repeat(GREY16[None] / 65535, 3, 0)),
        (COLOUR, 3, COLOUR.transpose(2, 0, 1) / 255),
        (COLOUR, 1, (COLOUR @ LUMA)[None] / 255),
    ],
    ids=["grey8", "grey16", "grey8-rgb", "grey16-rgb", "colour", "colour-grey"],
)
def test_every_depth_becomes_zero_to_one(tmp_path, array, channels, expected) -> None:
    found = load(tmp_path, record("xray", 0, array), image(channels))
    # Grey out of colour stays in the file's depth inside the decoder; the rest is exact.
    tolerance = 1.01 / 255 if array.ndim == 3 and channels == 1 else 1e-6
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_jpeg_as_pillow_decodes_it(tmp_path) -> None:
    smooth = np.asarray(Image.fromarray(COLOUR[:6, :8]).resize((44, 30), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    one = record("retina", 0, smooth)
    one.payload, one.extension = buffer.getvalue(), "jpg"
    expected = np.asarray(Image.open(buffer)).transpose(2, 0, 1) / 255
    found = load(tmp_path, one, image(3))
    # Decoders differ in how they smooth chroma.
    assert np.abs(found - expected).mean() < 1.5 / 255


@pytest.mark.parametrize("interpolation", ["linear", "bicubic"])
def test_reduction_as_pillow_resamples(tmp_path, interpolation) -> None:
    large = RNG.random((24, 24))
    large = np.kron(large, np.ones((5, 6))) * 0.8 + 0.1
    large16 = (large * 65535).astype(np.uint16)
    preprocess = image(1, (40, 36), interpolation=interpolation)
    found = load(tmp_path, record("xray", 0, large16), preprocess)
    method = Image.Resampling.BILINEAR if interpolation == "linear" else Image.Resampling.BICUBIC
    expected = np.asarray(Image.fromarray(large.astype(np.float32)).resize((36, 40), method))
    if interpolation == "linear":  # both widen a triangle by the factor of reduction
        np.testing.assert_allclose(found[0], expected, atol=2e-3)
    assert found.min() >= 0 and found.max() <= 1
    assert np.corrcoef(found[0].ravel(), expected.ravel())[0, 1] > 0.99


def test_pad_keeps_all_and_crop_keeps_the_centre(tmp_path) -> None:
    bars = np.zeros((40, 80), np.uint8)
    bars[:, :20], bars[:, 60:] = 100, 200
    padded = load(tmp_path / "a", record("xray", 0, bars), image(1, (40, 40), fit="pad"))[0]
    assert padded[:9].max() == 0 and padded[31:].max() == 0  # above and below
    np.testing.assert_allclose(padded[20, [3, 20, 36]], [100 / 255, 0, 200 / 255], atol=1e-6)
    cropped = load(tmp_path / "b", record("xray", 0, bars), image(1, (40, 40), fit="crop"))[0]
    assert cropped[:, 1:-1].max() == 0  # the bars are outside of the centre
    nearer = load(
        tmp_path / "c", record("xray", 0, bars), image(1, (40, 40), fit="crop", resize=80)
    )
    assert nearer.max() == 0


def test_mean_std_and_minmax(tmp_path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    found = load(tmp_path / "a", record("retina", 0, COLOUR), image(3, mean=mean, std=std))
    expected = (COLOUR / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-5)
    dim = (GREY8 // 4 + 20).astype(np.uint8)
    found = load(tmp_path / "b", record("xray", 0, dim), image(1, minmax=True))
    assert (found.min(), found.max()) == (0.0, pytest.approx(1.0))


def volume(size, **values) -> Preprocess:
    channels = len(values.get("hu_windows", (None,)))
    return Preprocess(kind="volume", size=size, channels=channels, **values)


@pytest.mark.parametrize("windows", [((-1000.0, 1000.0),), ((-1000.0, -400.0), (-160.0, 240.0))])
@pytest.mark.parametrize(("mean", "std"), [((0.0,), (1.0,)), ((0.1,), (0.5,))])
def test_hounsfield_units_are_windowed(tmp_path, windows, mean, std) -> None:
    hu = RNG.integers(-2000, 3000, (5, 12, 14)).astype(np.int16)
    preprocess = volume((5, 12, 14), fit="stretch", hu_windows=windows, mean=mean, std=std)
    found = load(tmp_path, record("ct", 0, hu), preprocess)
    assert found.shape == (len(windows), 5, 12, 14)
    for channel, (low, high) in zip(found, windows, strict=True):
        expected = (np.clip(hu.astype(float), low, high) - low) / (high - low) * 2 - 1
        np.testing.assert_allclose(channel, (expected - mean) / std, atol=1e-5)


def test_a_volume_is_padded_with_air_and_resampled_along_its_own_axes(tmp_path) -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.int16)[:, None, None] * 100, (8, 6, 6)).copy()
    padded = load(tmp_path / "a", record("ct", 0, ramp), volume((8, 10, 8), fit="pad"))[0]
    assert (padded[:, 0] == -1).all() and (padded[:, :, 0] == -1).all()
    np.testing.assert_allclose(padded[:, 5, 4], np.arange(8) / 10, atol=1e-6)
    small = load(tmp_path / "b", record("ct", 0, ramp), volume((4, 6, 6), fit="stretch"))[0]
    assert (np.diff(small[:, 3, 3]) > 0).all()
    np.testing.assert_allclose(small[:, 3, 3].mean(), 0.35, atol=1e-3)
    assert np.ptp(small[2]) < 1e-6  # the other axes were flat and stay so


def signal(samples: int, **values) -> Preprocess:
    return Preprocess(kind="signal", size=(samples,), channels=12, **values)


def tones(hertz: list[float], samples: int = 2000, amplitude: float = 800.0) -> np.ndarray:
    seconds = np.arange(samples) / 500
    leads = [amplitude * np.sin(2 * np.pi * f * seconds) for f in hertz]
    return np.round(np.stack(leads)).astype(np.int16)


def test_signals_keep_rate_leads_and_millivolt(tmp_path) -> None:
    array = tones([1.0 + lead for lead in range(12)])
    found = load(tmp_path, record("ecg", 0, array), signal(2000, rate_hz=500))
    np.testing.assert_allclose(found, array / 1000, atol=1e-6)


@pytest.mark.parametrize("rate", [250, 100])
def test_resampling_keeps_what_fits_and_removes_what_would_alias(tmp_path, rate) -> None:
    kept = [1.0 + 3 * lead for lead in range(11)]  # up to 31 Hz
    array = tones([*kept, 180.0])  # at 250 Hz it would appear as 70 Hz, at 100 Hz as 20 Hz
    samples = 4 * rate
    found = load(tmp_path, record("ecg", 0, array), signal(samples, rate_hz=rate))
    seconds = np.arange(samples) / rate
    inner = slice(rate // 5, -rate // 5)  # the filter has no data beyond both ends
    for lead, hertz in enumerate(kept):
        expected = 0.8 * np.sin(2 * np.pi * hertz * seconds)
        # 5 % of the amplitude: more means another frequency, phase (a sample early) or lead.
        assert np.abs(found[lead] - expected)[inner].max() < 0.04, hertz
    assert np.abs(found[11])[inner].max() < 0.01


def test_signals_are_cut_or_padded_around_their_centre(tmp_path) -> None:
    array = np.tile(np.arange(1000, dtype=np.int16), (12, 1))
    cut = load(tmp_path / "a", record("ecg", 0, array), signal(400, rate_hz=500))
    np.testing.assert_allclose(cut[3], np.arange(300, 700) / 1000, atol=1e-6)
    padded = load(tmp_path / "b", record("ecg", 0, array + 1), signal(1200, rate_hz=500))
    assert (padded[:, :100] == 0).all() and (padded[:, 1100:] == 0).all()
    np.testing.assert_allclose(padded[0, 100:1100], np.arange(1, 1001) / 1000, atol=1e-6)


@pytest.mark.parametrize("rate", [125, 250, 400])
def test_the_low_pass_is_flat_and_then_silent(rate) -> None:
    from m3bind.data.pipelines import low_pass

    taps = low_pass(rate)
    gain = np.abs(np.fft.rfft(taps, 4096))
    hertz = np.fft.rfftfreq(4096, 1 / 500)
    np.testing.assert_allclose(taps, taps[::-1])
    np.testing.assert_allclose(gain[hertz <= 0.4 * rate], 1, atol=0.005)
    assert gain[hertz >= 0.6 * rate].max(initial=0.0) < 0.005  # -46 dB
