"""prepare keeps patients' names out of shards and rejects, behind a salt that stays."""

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3bind.data.readers import ct_nifti
from m3bind.data.shards import iter_records
from m3bind.errors import M3BindError

from medical_files import body, ct_slice, radiograph, waveform  # isort: skip
from prepare_cases import manifest, picture, rejects, run, sine, tree  # isort: skip


def secret_files(folder: Path) -> list[dict[str, str]]:
    """A file of each kind that carries names, all under names of files that do so too."""
    stored = np.random.default_rng(0).integers(0, 999, (30, 20)).astype(np.uint16)
    radiograph(folder / "quisling_film.dcm", stored, "MONOCHROME1")
    series = folder / "quisling_series"
    series.mkdir()
    for index, hu in enumerate(body()):
        ct_slice(series / f"{index}.dcm", hu + 1024, (0, 0, -2.0 * index))
    waveform(folder / "quisling.dcm", sine(), 500)
    exif = Image.Exif()
    exif[0x010E] = "Zebediah Quisling"
    picture(folder / "MRN-7741902.jpg", exif=exif)
    rows = [
        "xray:quisling_film.dcm",
        "ct:quisling_series",
        "ecg:quisling.dcm",
        "retina:MRN-7741902.jpg",
    ]
    return [
        {"modality": m, "path": p, "patient": "Quisling^Zebediah", "labels": ""}
        for m, p in (row.split(":") for row in rows)
    ]


def test_no_identifier_of_a_patient_enters_the_shards(tmp_path) -> None:
    out = tmp_path / "out"
    assert run(manifest(tmp_path, *secret_files(tmp_path)), out) == (4, 0)
    content = b"".join(data for name, data in tree(out).items() if name != ".salt").lower()
    for word in ("quisling", "zebediah", "7741902", "19330214", "acc5550123", "elsewhere"):
        assert word.encode() not in content, word
    (film,) = iter_records(out, "xray", "train")
    (series,) = iter_records(out, "ct", "train")
    assert film.patient == series.patient != "" and "Quisling" not in film.patient
    assert stat.S_IMODE((out / ".salt").stat().st_mode) == 0o600
    np.testing.assert_array_equal(series.array(), body())
    assert series.source["files"] == 6


def test_rejects_hold_no_path(tmp_path, monkeypatch) -> None:
    """A path may name the patient, also where a library puts it into its error."""
    folder = tmp_path / "QUISLING_ZEBEDIAH"
    folder.mkdir()
    (folder / "quisling.hea").write_text("quisling 12 500 5000\nquisling.dat 16\n")
    (folder / "quisling.nii").write_bytes(b"no NIfTI" * 99)
    picture(folder / "quisling.png")
    picture(tmp_path / "good.png", 1)

    def read(path: Path, part: str = "") -> Any:
        raise OSError(13, "Permission denied", str(path))

    monkeypatch.setattr(ct_nifti, "read", read)
    rows = [
        {"path": f"{folder.name}/quisling.hea", "modality": "ecg"},
        {"path": f"{folder.name}/quisling.nii", "modality": "ct"},
        {"path": f"{folder.name}/gone.png"},
        {"path": "good.png"},
    ]
    out = tmp_path / "out"
    assert run(manifest(tmp_path, *rows), out) == (1, 3)
    assert [reject["line"] for reject in rejects(out)] == [2, 4, 6]  # a report runs over two
    assert "Permission denied: 'the file'" in rejects(out)[1]["reason"]
    assert "quisling" not in (out / "rejects.jsonl").read_text().lower()


def test_pseudonyms_follow_the_salt(tmp_path, monkeypatch) -> None:
    picture(tmp_path / "a.png")
    path = manifest(tmp_path, {"path": "a.png"})

    def patient(out: Path) -> str:
        run(path, out)
        return next(iter_records(out, "retina", "train")).patient

    first, second = patient(tmp_path / "x"), patient(tmp_path / "y")
    assert first != second and patient(tmp_path / "x") == first  # kept when it is done again
    monkeypatch.setenv("M3BIND_SALT", "a secret")
    third = patient(tmp_path / "z")
    assert third == patient(tmp_path / "y") and not (tmp_path / "z" / ".salt").exists()


def test_an_empty_salt_is_refused(tmp_path) -> None:
    picture(tmp_path / "a.png")
    path = manifest(tmp_path, {"path": "a.png"})
    run(path, tmp_path / "out")
    (tmp_path / "out" / ".salt").write_text("")
    with pytest.raises(M3BindError, match=r"\.salt is empty: restore it"):
        run(path, tmp_path / "out")


def test_a_report_that_names_the_patient_is_rejected(tmp_path) -> None:
    rows = secret_files(tmp_path)[:1]
    rows[0] |= {"patient": "someone"}
    texts = ["Mr Zebediah Quisling has a clear chest.", "Film of MRN-7741902.", "Quisling sign."]
    path = manifest(tmp_path, *(rows[0] | {"report": text} for text in texts))
    assert run(path, tmp_path / "out") == (1, 2)  # one word of a name may be a word
    assert {r["reason"] for r in rejects(tmp_path / "out")} == {"the report names the patient"}
