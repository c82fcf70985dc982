"""prepare as a whole: manifest in, shards out; faults, rejects, secrecy, and doing it again."""

import csv
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from m3bind.data.audit import audit
from m3bind.data.constants import LEADS
from m3bind.data.dataset import Dataset
from m3bind.data.manifest import Entry
from m3bind.data.prepare import prepare
from m3bind.data.readers import ct_nifti, image
from m3bind.data.shards import iter_records
from m3bind.data.workers import Job
from m3bind.data.workers import run as run_jobs
from m3bind.errors import M3BindError

from medical_files import body, ct_slice, limb_leads, radiograph, waveform  # isort: skip

COLUMNS = ("path", "modality", "patient", "split", "report", "labels", "part")


def picture(path: Path, seed: int = 0, **save: Any) -> Path:
    array = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    Image.fromarray(array).resize((56, 48)).save(path, **save)
    return path


def manifest(folder: Path, *rows: dict[str, str], name: str = "manifest.csv") -> Path:
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, row in enumerate(rows):
            defaults = {
                "modality": "retina", "patient": f"Jane Roe {number}", "split": "train",
                "report": "FINDINGS: clear disc.\nIMPRESSION: none.", "labels": "none",
            }  # fmt: skip
            writer.writerow(defaults | row)
    return path


def run(path: Path, out: Path, **values: Any) -> tuple[int, int]:
    result = prepare(path, out, **{"name": "t", "workers": 1, "progress": False} | values)
    return result.written, result.rejected


def rejects(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def tree(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_manifest_to_shards(tmp_path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.jpg", 1)
    path = manifest(
        tmp_path,
        {"path": "a.png", "labels": "diabetes; hypertension"},
        {"path": "b.jpg", "split": "test", "labels": ""},
    )
    assert run(path, tmp_path / "out") == (2, 0)
    assert audit(tmp_path / "out") == {"retina/train": 1, "retina/test": 1}
    dataset = Dataset.load(tmp_path / "out")
    assert (dataset.simulated, dataset.labels) == (False, ["diabetes", "hypertension"])
    assert dataset.modalities["retina"].prompts["name"]["diabetes"] == ["diabetes"]
    (record,) = iter_records(tmp_path / "out", "retina", "train")
    assert record.labels == ("diabetes", "hypertension") and not record.simulated
    np.testing.assert_array_equal(record.array(), np.asarray(Image.open(tmp_path / "a.png")))
    assert record.source["reader"] == "image" and len(record.source["sha256"]) == 64
    assert not (tmp_path / "out" / "rejects.jsonl").exists()
    assert not (tmp_path / "out" / ".unfinished").exists()


def sine(leads: int = 12) -> dict[str, np.ndarray]:
    t = np.arange(5000) / 500
    uv = limb_leads([400 * np.sin(2 * np.pi * t + k) for k in range(12)])
    return dict(zip(LEADS[:leads], uv.astype(np.int16), strict=False))


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


def test_a_report_that_names_the_patient_is_rejected(tmp_path) -> None:
    rows = secret_files(tmp_path)[:1]
    rows[0] |= {"patient": "someone"}
    texts = ["Mr Zebediah Quisling has a clear chest.", "Film of MRN-7741902.", "Quisling sign."]
    path = manifest(tmp_path, *(rows[0] | {"report": text} for text in texts))
    assert run(path, tmp_path / "out") == (1, 2)  # one word of a name may be a word
    assert {r["reason"] for r in rejects(tmp_path / "out")} == {"the report names the patient"}


def test_every_fault_is_one_line_and_the_rest_goes_on(tmp_path) -> None:
    whole = picture(tmp_path / "good.jpg", quality=95).read_bytes()
    (tmp_path / "corrupt.jpg").write_bytes(whole[:400] + bytes(range(60)) + whole[460:])
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    picture(tmp_path / "other.png", 3)
    waveform(tmp_path / "eleven.dcm", sine(11), 500)
    twice = np.concatenate([body()] * 2).transpose(2, 1, 0) - 1024
    nib.save(nib.Nifti1Image(twice, np.diag([-0.8, -0.8, 2, 1])), tmp_path / "twice.nii.gz")
    (tmp_path / "folder").mkdir()
    rows = [
        ({"path": "good.jpg"}, None),
        ({"path": "corrupt.jpg"}, "JPEG|decoded"),
        ({"path": "cut.jpg"}, "cut|truncated|decoded"),
        ({"path": "eleven.dcm", "modality": "ecg"}, "lead V6 is missing"),
        ({"path": "twice.nii.gz", "modality": "ct"}, "rescaled twice"),
        ({"path": "good.jpg", "report": " \n"}, "report is empty"),
        ({"path": "good.jpg", "report": "FINDINGS:\nIMPRESSION:"}, "report is empty"),
        ({"path": "good.jpg", "modality": "xrays"}, "did you mean 'xray'"),
        ({"path": "gone.jpg"}, "no such file"),
        ({"path": "good.jpg", "split": "dev"}, "unknown split"),
        ({"path": "folder"}, "is a folder"),
        ({"path": "good.jpg", "patient": ""}, "patient is empty"),
        ({"path": "good.jpg", "split": "test"}, "stands in the split train already"),
        ({"path": "other.png", "split": "test"}, None),
    ]  # fmt: skip
    path = manifest(tmp_path, *(row for row, _ in rows))
    out = tmp_path / "out"
    wrong = [(row, words) for row, words in rows if words]
    assert run(path, out) == (2, len(wrong))
    assert audit(out) == {"retina/train": 1, "retina/test": 1}
    found = rejects(out)
    lines = path.read_text().split("\n")
    for (row, words), reject in zip(wrong, found, strict=True):
        assert lines[reject["line"] - 1].startswith(f"{row['path']},") and reject["remedy"]
        assert set(reject) == {"line", "reason", "remedy"}
        assert re.search(words, reject["reason"]), reject
        assert "Traceback" not in json.dumps(reject)


def test_a_manifest_at_fault_stops_before_anything_is_written(tmp_path) -> None:
    picture(tmp_path / "a.png")
    out = tmp_path / "out"

    def refuse(path: Path, words: str, **values: Any) -> None:
        with pytest.raises(M3BindError, match=words):
            run(path, out, **values)
        assert not out.exists()

    rows = [{"path": "a.png", "patient": "Jane", "split": s} for s in ("train", "test")]
    refuse(manifest(tmp_path, *rows), r"two splits: Jane \(test and train\)")
    path = tmp_path / "m.csv"
    path.write_text("path,modality,patient,split,report,lables\na.png,retina,p,train,x,y\n")
    refuse(path, r"unknown column 'lables' \(did you mean 'labels'\?\)")
    path.write_text("path,modality,split,report\n")
    refuse(path, "'patient' is missing")
    path.write_text("path,modality,patient,split\n")
    refuse(path, "'report' is missing")
    path.write_text("path,modality,patient,split,report\n")
    refuse(path, "lists no file")
    path.write_bytes(b"\xff\xfe\x00")
    refuse(path, "UTF-8")
    refuse(tmp_path / "none.csv", "no such manifest")
    described = tmp_path / "d.yaml"
    described.write_text("labels: [none]\n")
    good = manifest(tmp_path, {"path": "a.png", "labels": "diabetes"})
    refuse(good, "line 2: label 'diabetes' is not among", description=described)
    described.write_text("modalities: {fundus: {kind: photo}}\n")
    refuse(good, "modalities.fundus.kind: 'photo'", description=described)
    described.write_text("label: [none]\n")
    refuse(good, "unknown key 'label'", description=described)


def test_json_lines_sections_and_a_modality_of_ones_own(tmp_path) -> None:
    picture(tmp_path / "a.png")
    row = {
        "path": "a.png", "modality": "dermoscopy", "patient": 17, "split": "val",
        "findings": "A regular network.", "impression": "Naevus.", "labels": ["naevus"],
    }  # fmt: skip
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row) + "\n\n{broken\n")
    described = tmp_path / "d.yaml"
    described.write_text(
        "labels: [none, naevus]\nmodalities: {dermoscopy: {kind: image2d, prompts: "
        "{name: {naevus: [a mole]}, findings: {naevus: [regular network]}}}}\n"
    )
    assert run(path, tmp_path / "out", description=described) == (1, 1)
    (record,) = iter_records(tmp_path / "out", "dermoscopy", "val")
    assert record.report == "FINDINGS: A regular network.\nIMPRESSION: Naevus."
    dataset = Dataset.load(tmp_path / "out")
    info = dataset.modalities["dermoscopy"]
    assert dataset.labels == ["none", "naevus"] and info.kind == "image2d"
    assert info.prompts["name"] == {"naevus": ["a mole"]}
    assert info.prompts["findings"] == {"naevus": ["regular network"]}


@pytest.mark.parametrize(
    ("labels", "prompts", "message"),
    [
        ("[none, x]", "findings: {x: [sign]}", r"'none' has no prompt .*prompts.findings"),
        ("[]", "findings: {x: [sign]}", r"line 2: label 'none' has no prompt in .*findings"),
        ("[none, x]", "name: {nane: [healthy]}", r"prompts\.name: 'nane' is not among"),
    ],
)  # fmt: skip
def test_prompts_for_some_labels_only_stop_before_anything_is_read(
    tmp_path, labels, prompts, message
) -> None:
    path, out = manifest(tmp_path, {"path": "a.png"}), tmp_path / "out"
    described = tmp_path / "d.yaml"
    described.write_text(f"modalities: {{retina: {{labels: {labels}, prompts: {{{prompts}}}}}}}\n")
    with pytest.raises(M3BindError, match=message):
        run(path, out, description=described)
    assert not out.exists()


def test_json_lines_end_at_newlines_alone(tmp_path) -> None:
    picture(tmp_path / "a.png")
    report = "FINDINGS: clear\u2028disc\x85and macula"
    row = {"path": "a.png", "modality": "retina", "patient": "x", "split": "val", "report": report}
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert run(path, tmp_path / "out") == (1, 0)
    (record,) = iter_records(tmp_path / "out", "retina", "val")
    assert record.report == report


def test_only_an_earlier_result_is_replaced_and_only_by_a_whole_one(tmp_path) -> None:
    picture(tmp_path / "a.png")
    path, out = manifest(tmp_path, {"path": "a.png"}), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(M3BindError, match=r"not empty, and thesis\.txt"):
        run(path, out)
    (out / "thesis.txt").unlink()
    run(path, out)
    first = tree(out)
    run(path, out)
    assert tree(out) == first  # the same bytes, salt and all
    bad = manifest(tmp_path, {"path": "gone.png"}, name="bad.csv")
    with pytest.raises(M3BindError, match="none of the 1 files"):
        run(bad, out)
    kept = tree(out)
    assert rejects(out) and kept.pop("rejects.jsonl") and kept == first
    run(path, out)
    assert tree(out) == first  # the list of the failed attempt is gone
    (out / "retina" / "train" / "notes.tar").write_bytes(b"mine")
    with pytest.raises(M3BindError, match=r"retina/train/notes\.tar"):
        run(path, out)


def test_an_interruption_leaves_the_earlier_result(tmp_path, monkeypatch) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 1)
    out = tmp_path / "out"
    run(manifest(tmp_path, {"path": "a.png"}), out)
    first = tree(out)
    two = manifest(tmp_path, {"path": "b.png"}, {"path": "a.png"}, name="two.csv")
    real = image.read

    def read(path: Path, part: str = "") -> Any:
        if path.name == "a.png":
            raise KeyboardInterrupt
        return real(path, part)

    monkeypatch.setattr(image, "read", read)
    with pytest.raises(KeyboardInterrupt):
        run(two, out)
    assert tree(out) == first
    monkeypatch.undo()
    assert run(two, out) == (2, 0)


def test_processes_give_the_same_bytes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("M3BIND_SALT", "s")
    rows = []
    for number in range(7):
        picture(tmp_path / f"{number}.png", number)
        rows.append({"path": f"{number}.png", "split": ("train", "test")[number % 2]})
    rows[3]["path"] = "gone.png"
    path = manifest(tmp_path, *rows)
    assert run(path, tmp_path / "one") == run(path, tmp_path / "two", workers=2) == (6, 1)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


class Deadly:
    """Ends the process that unpickles it, as a decoder does that overruns its memory."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_a_reader_that_crashes_costs_one_file(tmp_path) -> None:
    picture(tmp_path / "a.png")

    def job(number: int) -> Job:
        entry = Entry(
            line=number, path="a.png", modality="retina", patient="p", split="train", report="r"
        )
        path: Any = Deadly() if number == 1 else tmp_path / "a.png"
        return Job(entry=entry, path=path, kind="image2d", prefix=f"a-{number}", pseudonym="p")

    outcomes = list(run_jobs([job(number) for number in range(3)], workers=2))
    assert [len(outcome.records) for outcome in outcomes] == [1, 0, 1]
    assert [outcome.entry.line for outcome in outcomes] == [0, 1, 2]
    assert outcomes[1].problem and "crashed" in outcomes[1].problem[0]


def test_command_line(tmp_path, monkeypatch, capsys) -> None:
    from m3bind import cli

    picture(tmp_path / "a.png")
    path = manifest(tmp_path, {"path": "a.png"}, {"path": "gone.png"})
    monkeypatch.setattr(
        "sys.argv", ["m3bind", "prepare", str(path), str(tmp_path / "my.out"), "--workers", "1"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert "1 rejected, reasons in" in capsys.readouterr().out
    (shard,) = (tmp_path / "my.out" / "retina" / "train").glob("*.tar")
    assert shard.name == "my-out-retina-train-000000.tar"


def test_an_empty_salt_is_refused(tmp_path) -> None:
    picture(tmp_path / "a.png")
    path = manifest(tmp_path, {"path": "a.png"})
    run(path, tmp_path / "out")
    (tmp_path / "out" / ".salt").write_text("")
    with pytest.raises(M3BindError, match=r"\.salt is empty: restore it"):
        run(path, tmp_path / "out")
