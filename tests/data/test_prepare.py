"""prepare as a whole: manifest in, shards out; faults, rejects, secrecy, and doing it again."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3bind.data.prepare import prepare
from m3bind.data.shards import Dataset, audit, iter_records, shard_paths
from m3bind.errors import M3BindError

COLUMNS = ("path", "modality", "patient", "split", "report", "labels")


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
