"""Checks of a whole data set: no patient in two splits, every byte as it was written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3bind.data.constants import SPLITS
from m3bind.data.dataset import Dataset
from m3bind.data.shards import AGAIN, iter_records, read_index, shard_paths
from m3bind.errors import M3BindError


def check_patients(root: str | Path) -> dict[str, set[str]]:
    """The modalities in which each patient occurs; quick, as it reads metadata alone.

    Raises M3BindError where one patient, or the same image, volume or signal under two patients'
    names (as in data sets that were prepared apart and put together), stands in two splits: a
    model would be tested on those it was trained on.
    """
    splits = dict[str, tuple[str, str]]()  # a patient or a checksum: where it was seen first
    found = dict[str, set[str]]()
    for modality in Dataset.load(root).modalities:
        for split in SPLITS:
            for meta in _iter_meta(root, modality, split):
                patient, checksum = str(meta["patient"]), str(meta["sha256"])
                for what in (patient, checksum):
                    other, sample = splits.setdefault(what, (split, meta["id"]))
                    if other != split:
                        named = f"patient {patient}" if what == patient else "the same payload"
                        raise M3BindError(
                            f"{root}: {named} stands in the splits {other} and {split} ({sample} "
                            f"and {meta['id']}): put all samples of a patient into one"
                        )
                found.setdefault(patient, set()).add(modality)
    return found


def shared_patients(root: str | Path) -> int:
    """How many patients occur in more than one modality; raises as `check_patients`."""
    return sum(len(modalities) > 1 for modalities in check_patients(root).values())


def _iter_meta(root: str | Path, modality: str, split: str) -> Iterator[dict[str, Any]]:
    """The metadata of a split's samples, found by the index: the payloads are not read."""
    for path in shard_paths(root, modality, split):
        with path.open("rb") as shard:
            for number, parts in enumerate(read_index(path)):
                try:
                    start, size = parts["json"]
                    shard.seek(start)
                    meta = json.loads(shard.read(size))
                    yield {name: meta[name] for name in ("id", "patient", "sha256")}
                except (ValueError, KeyError, TypeError) as error:
                    raise M3BindError(
                        f"{path}: the metadata of its sample {number} cannot be read "
                        f"({type(error).__name__}): {AGAIN}"
                    ) from None


def audit(root: str | Path) -> dict[str, int]:
    """Check every sample, byte by byte; returns the samples by ``modality/split``.

    Raises M3BindError for a patient in two splits, a damaged sample, or an unknown label.
    """
    dataset = Dataset.load(root)
    check_patients(root)
    counts = dict[str, int]()
    for modality, info in dataset.modalities.items():
        for split in SPLITS:
            for record in iter_records(root, modality, split):
                where = f"{modality}/{split}"
                counts[where] = counts.get(where, 0) + 1
                for label in record.labels:
                    if label not in info.labels:
                        raise M3BindError(
                            f"{root}: {record.id} has the label {label!r}, which dataset.yaml "
                            f"does not give for {modality}"
                        )
    return counts
