"""Small shards for the loader's tests."""

from pathlib import Path
from typing import Any

import numpy as np

from m3bind.data.constants import KIND
from m3bind.data.records import Record
from m3bind.data.shard_writer import ShardWriter


def record(modality: str, number: int, array: np.ndarray, **values: Any) -> Record:
    make = {
        "image2d": Record.from_image,
        "volume": Record.from_volume,
        "signal": Record.from_signal,
    }[KIND[modality]]
    common = {
        "id": f"{modality}-{number:04d}", "patient": f"p{number}", "modality": modality,
        "report": f"FINDINGS: number {number}, caf\u00e9.\nIMPRESSION: none.", "split": "train",
        "simulated": True,
    }  # fmt: skip
    return make(array, **{**common, **values})


def write(root: Path, records: list[Record], per_shard: int = 512) -> Path:
    first = records[0]
    with ShardWriter(root, "simulated", first.modality, first.split, per_shard) as writer:
        for each in records:
            writer.write(each)
    return root


def noise(modality: str, seed: int) -> np.ndarray:
    """An array of the modality's kind, smooth enough to be decoded to something."""
    rng = np.random.default_rng(seed)
    if KIND[modality] == "volume":
        return rng.integers(-1100, 1500, (6, 20, 24)).astype(np.int16)
    if KIND[modality] == "signal":
        return rng.integers(-900, 900, (12, 700 + 50 * (seed % 3))).astype(np.int16)
    if modality == "xray":
        return rng.integers(0, 65536, (40, 36)).astype(np.uint16)
    return rng.integers(0, 256, (36, 40, 3)).astype(np.uint8)


def cohort(root: Path, modality: str, num: int, per_shard: int = 5) -> Path:
    return write(root, [record(modality, i, noise(modality, i)) for i in range(num)], per_shard)
