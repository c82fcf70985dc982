"""ECGs: microvolt against wfdb's physical values, leads in any order, rates, what is incomplete."""

from pathlib import Path

import numpy as np
import pytest
import wfdb

from m3bind.data.constants import LEADS
from m3bind.data.readers import common, reader_for
from m3bind.data.readers.common import Unreadable
from m3bind.data.readers.ecg import lead_of

from medical_files import limb_leads, waveform  # isort: skip


def read(path, part=""):
    return reader_for(path, "ecg", "signal").read(path, part)


def refuse(path, words, part=""):
    with pytest.raises(Unreadable, match=words) as caught:
        read(path, part)
    assert caught.value.remedy and "\n" not in caught.value.reason


def wave(seconds=10.0, rate=500, amplitude=0.8):
    """Millivolt [samples, 12]: slow sines that tell the leads apart, and limb leads that fit."""
    t = np.arange(int(seconds * rate)) / rate
    return limb_leads([amplitude * np.sin(2 * np.pi * (k + 1) * t + k) for k in range(12)]).T


def record(folder, millivolt, names=LEADS, rate=500, units="mV", scale=1.0, **values):
    defaults = {"fmt": ["16"] * len(names), "adc_gain": [1000.0 / scale] * len(names)}
    wfdb.wrsamp(
        "r1", fs=rate, units=[units] * len(names), sig_name=list(names),
        p_signal=millivolt * scale, baseline=[0] * len(names), write_dir=str(folder),
        **(defaults | values),
    )  # fmt: skip
    return folder / "r1.hea"


# 1 mV is 1000 uV whatever the header calls it
@pytest.mark.parametrize(("units", "scale"), [("mV", 1.0), ("uV", 1000.0), ("V", 1e-3)])
def test_wfdb_as_wfdb_gives_it(tmp_path, units, scale) -> None:
    path = record(tmp_path, wave(), units=units, scale=scale)
    (reading,) = read(path)
    truth = wfdb.rdrecord(str(path.with_suffix(""))).p_signal.T * 1000 / scale
    assert reading.array.shape == (12, 5000) and reading.array.dtype == np.int16
    assert np.abs(reading.array - truth).max() <= 0.5 + 1e-6
    assert reading.where["source_rate_hz"] == 500
    for name in ("r1", "r1.dat"):  # a record may be named in each of these ways
        np.testing.assert_array_equal(read(tmp_path / name)[0].array, reading.array)


def test_leads_come_in_the_standard_order_whatever_the_file_has(tmp_path) -> None:
    order = np.random.default_rng(0).permutation(12)
    names = [LEADS[i].upper() for i in order]
    signal = wave()
    straight = read(record(tmp_path, signal))[0].array
    shuffled = read(record(tmp_path, signal[:, order], names))[0].array
    np.testing.assert_array_equal(shuffled, straight)
    extra = np.column_stack([wave()[:, :1] * 0.1, signal])  # a 13th channel is no lead
    np.testing.assert_array_equal(
        read(record(tmp_path, extra, ["RESP", *LEADS]))[0].array, straight
    )


@pytest.mark.parametrize("rate", [100, 128, 250, 360, 500, 1000, 977])
def test_resampling_of_known_sines(tmp_path, rate) -> None:
    (reading,) = read(record(tmp_path, wave(rate=rate), rate=rate))
    truth = 1000 * wave(reading.array.shape[1] / 500).T
    assert abs(reading.array.shape[1] - 5000) <= 1
    inner = slice(100, -100)  # 0.2 s: the filter sees no samples beyond the ends
    assert np.abs(reading.array - truth)[:, inner].max() < 8  # 1 % of 800 uV


def test_a_frequency_beyond_the_new_rate_does_not_fold_back(tmp_path) -> None:
    t = np.arange(20000) / 2000
    hum = wave(rate=2000, amplitude=0.01) + 0.5 * np.sin(2 * np.pi * 700 * t)[:, None]
    (reading,) = read(record(tmp_path, hum, rate=2000))
    assert np.abs(reading.array[:, 100:-100]).max() < 25  # of 500 uV


def test_windows_of_ten_seconds(tmp_path) -> None:
    path = record(tmp_path, wave(34.0))
    readings = read(path)
    assert [r.array.shape for r in readings] == [(12, 5000)] * 3
    assert [r.where["start_s"] for r in readings] == [0, 10, 20]
    assert len({r.part for r in readings}) == 3
    whole = np.rint(wfdb.rdrecord(str(tmp_path / "r1")).p_signal.T * 1000)
    np.testing.assert_array_equal(np.hstack([r.array for r in readings]), whole[:, :15000])
    (part,) = read(path, "7:17")
    np.testing.assert_array_equal(part.array, whole[:, 3500:8500])
    refuse(path, "within 0:34", "30:40")
    assert read(record(tmp_path, wave(7.0)))[0].array.shape == (12, 3500)
    refuse(record(tmp_path, wave(3.0)), "lasts 3.00 s")


def test_a_long_recording_is_thinned(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(common, "MAX_PARTS", 3)
    readings = read(record(tmp_path, wave(70.0, 100), rate=100))
    assert [r.where["start_s"] for r in readings] == [0, 20, 40]
    assert readings[0].where["windows"] == 7


def test_wfdb_that_is_refused(tmp_path) -> None:
    signal = wave()
    refuse(record(tmp_path, signal[:, :11], LEADS[:11]), "lead V6 is missing")
    holes = signal.copy()
    holes[1234, 4] = np.nan
    refuse(record(tmp_path, holes), r"lead aVL has 1 samples.*NaN.*2.47 s")
    flat = signal.copy()
    flat[:, 7] = 0.3
    refuse(record(tmp_path, flat), "lead V2 is flat")
    refuse(record(tmp_path, signal, units="furlong"), "furlong")
    refuse(record(tmp_path, signal, [*LEADS[:11], "v1"]), "V1 stands there twice")
    refuse(record(tmp_path, signal * 50, adc_gain=[100.0] * 12), "mV cannot be")
    refuse(record(tmp_path, wave(60, 50), rate=50), "50 samples a second")
    path = record(tmp_path, signal)
    data = path.with_suffix(".dat")
    data.write_bytes(data.read_bytes()[:20000])
    refuse(path, "cannot be read as a WFDB")
    data.unlink()
    refuse(path, r"a \.dat file that the record's header names is missing")
    path.write_text("nonsense\n")
    refuse(path, "cannot be read as a WFDB")


def samples(order=range(12)):
    return {LEADS[i]: np.rint(wave()[:, i] * 1000 / 1.25).astype(np.int16) for i in order}


@pytest.mark.parametrize("unit", ["uV", "mV"])
def test_dicom_waveform(tmp_path, unit) -> None:
    sensitivity = {"uV": 1.25, "mV": 0.00125}[unit]
    order = np.random.default_rng(1).permutation(12)
    path = waveform(
        tmp_path / "a.dcm", samples(order), 500, unit=unit, sensitivity=sensitivity,
        baseline=sensitivity * 8,
    )  # fmt: skip
    (reading,) = read(path)  # and not the median beat before it
    truth = np.stack([samples()[lead] * 1.25 + 10 for lead in LEADS])
    assert np.abs(reading.array - truth).max() <= 0.5
    assert "Quisling" in reading.identifiers[0]


def test_real_dicom_waveform_as_pydicom() -> None:
    import pydicom
    from pydicom.data import get_testdata_file
    from pydicom.waveforms import multiplex_array

    path = get_testdata_file("waveform_ecg.dcm")
    (reading,) = read(Path(path))
    truth = multiplex_array(pydicom.dcmread(path), 0, as_raw=False).T  # 1000 Hz, uV, same order
    assert reading.array.shape == (12, 5000)
    # Every second sample of a recording that its own low-pass filter has smoothed.
    difference = reading.array[:, 50:-50] - truth[:, ::2][:, 50:-50]
    assert np.sqrt((difference**2).mean()) < 0.05 * truth.std()


def test_dicom_waveform_that_is_refused(tmp_path) -> None:
    path = tmp_path / "a.dcm"
    refuse(waveform(path, samples(range(11)), 500), "lead V6 is missing")
    hole = samples()
    hole["V3"][77] = -32768
    refuse(waveform(path, hole, 500, padding=-32768), "lead V3 has 1 samples")
    whole = waveform(path, samples(), 500).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuse(path, "cut|parsed|no waveforms")


@pytest.mark.parametrize(
    ("text", "lead"),
    [
        ("Lead I (Einthoven)", "I"), ("MDC_ECG_LEAD_AVR", "aVR"), ("v1", "V1"), ("III", "III"),
        ("AVF", "aVF"), ("Lead-aVR", "aVR"), ("ECG-I", "I"), ("ECG - I", "I"), ("MLII", None),
        ("V10", None), ("I-II", None), ("", None),
        ("-aVR", "-aVR"), ("Lead -aVR", "-aVR"), ("Lead (\N{MINUS SIGN}aVR)", "-aVR"),
        ("aVR (-)", "-aVR"), ("MDC_ECG_LEAD_neg_AVR", "-aVR"), ("MDC_ECG_LEAD_AVRneg", "-aVR"),
        ("inverted aVL", "-aVL"), ("minus III", "-III"),
    ],
)  # fmt: skip
def test_names_of_leads(text, lead) -> None:
    found = lead_of(text)
    assert (found and found[0].rjust(len(found[0]) + (found[1] < 0), "-")) == lead


def test_an_inverted_lead_comes_in_upright(tmp_path) -> None:
    """Cabrera's order of the limb leads holds -aVR."""
    (straight,) = read(record(tmp_path, wave()))
    names = ["-aVR" if lead == "aVR" else lead for lead in LEADS]
    turned = wave()
    turned[:, 3] *= -1
    (reading,) = read(record(tmp_path, turned, names))
    np.testing.assert_array_equal(reading.array, straight.array)
    assert reading.steps[1:] == ["lead aVR turned: it stood there inverted (-aVR)"]
    dicom = samples()
    dicom["-aVR"] = -dicom.pop("aVR")
    (reading,) = read(waveform(tmp_path / "a.dcm", dicom, 500))
    assert np.abs(reading.array - straight.array).max() <= 1
    assert any("aVR turned" in step for step in reading.steps)


@pytest.mark.parametrize("lead", LEADS[:6])
def test_limb_leads_that_contradict_each_other_are_refused(tmp_path, lead) -> None:
    """An inverted lead under the usual name; electrodes that fell off for 2 s are no reason."""
    signal = wave() + 0.005 * np.random.default_rng(0).standard_normal((5000, 12))
    signal[1000:2000, 3] = 0
    signal[:, 1] += np.linspace(0, 1, 5000)
    path = record(tmp_path, signal)
    assert len(read(path)) == 1
    signal[:, LEADS.index(lead)] *= -1
    refuse(record(tmp_path, signal), r"is not .*: they differ by \d+ uV")
