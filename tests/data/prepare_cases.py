"""Manifests of small files for the tests of prepare, and what it made of them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m3bind.data.constants import LEADS
from m3bind.data.prepare import prepare

from medical_files import limb_leads  # isort: skip

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


def sine(leads: int = 12) -> dict[str, np.ndarray]:
    t = np.arange(5000) / 500
    uv = limb_leads([400 * np.sin(2 * np.pi * t + k) for k in range(12)])
    return dict(zip(LEADS[:leads], uv.astype(np.int16), strict=False))
