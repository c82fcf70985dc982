"""prepare meets faults of files, manifest and description: one line each, the rest goes on."""

import json
import os
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from m3bind.data.audit import audit
from m3bind.data.manifest import Entry
from m3bind.data.workers import Job, _without_path
from m3bind.data.workers import run as run_jobs
from m3bind.errors import M3BindError

from medical_files import body, waveform  # isort: skip
from prepare_cases import manifest, picture, rejects, run, sine  # isort: skip


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


def test_no_part_of_a_path_is_told(tmp_path, monkeypatch) -> None:
    """Names with spaces, in a folder or beside the file, by any way of naming them."""
    folder = tmp_path / "DOE JANE" / "CT 1970"
    folder.mkdir(parents=True)
    (folder / "DOE JANE 7.dcm").touch()
    (tmp_path / "DOE JANE.hea").touch()
    monkeypatch.chdir(tmp_path)
    for path, named in (
        (folder, folder / "DOE JANE 7.dcm"), (folder, "DOE JANE 7.dcm"), (folder, folder),
        (Path("DOE JANE/CT 1970"), folder / "DOE JANE 7.dcm"),
        (Path("DOE JANE/CT 1970"), "DOE JANE/CT 1970/DOE JANE 7.dcm"),
        (tmp_path / "DOE JANE.hea", tmp_path / "DOE JANE.dat"),
        (tmp_path / "DOE JANE.hea", "DOE JANE.dat"), (Path("DOE JANE.hea"), "DOE JANE.hea"),
    ):  # fmt: skip
        said = _without_path(
            f"it cannot be read: [Errno 2] nothing at '{named}': twice", Path(path)
        )
        assert said == "it cannot be read: [Errno 2] nothing at 'the file': twice"
