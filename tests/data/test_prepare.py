"""prepare as a whole: manifest in, shards out, in any number of processes, and again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3bind.data.audit import audit
from m3bind.data.dataset import Dataset
from m3bind.data.readers import image
from m3bind.data.shards import iter_records
from m3bind.errors import M3BindError

from prepare_cases import manifest, picture, rejects, run, tree  # isort: skip


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
