"""Embeddings on disk: one safetensors file for each stage, modality and split."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3bind.errors import M3BindError
from m3bind.files import write_tensors

__all__ = ["EmbeddingSet", "Prompts", "as_unit", "load_stage", "save_stage", "stage_path"]

# kind of prompt ("name", "findings") -> label -> [num_prompts, D], every row of unit norm
Prompts = Mapping[str, Mapping[str, np.ndarray]]

_FORMAT = "m3bind-embeddings-1"


def as_unit(
    x: Any,  # [N, D]
    name: str,
) -> np.ndarray:
    """``np.asarray(x, float32)``, checked: two axes, finite, every row of unit norm (1e-3).

    Accepts arrays and CPU tensors. Raises ``ValueError`` with the first offending row.
    """
    array = np.asarray(x, dtype=np.float32)
    if array.ndim != 2:
        raise ValueError(f"{name} must be [N, D], got shape {array.shape}")
    norms = np.linalg.norm(array, axis=1)
    bad = ~(np.abs(norms - 1.0) <= 1e-3)  # also true for NaN
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name}: row {row} has norm {norms[row]:.4g}, expected 1; "
            "normalise with torch.nn.functional.normalize(x, dim=-1)"
        )
    return array


@dataclass(kw_only=True, slots=True)
class EmbeddingSet:
    """Embeddings of one split of one modality, as one stage's encoders give them.

    ``image`` and ``text`` (whole report) are float32 [N, D] of unit norm, ``text`` [0, D] where
    reports were not embedded; ``labels`` holds one
    label for each row, "" where none is known ("none" is a label: no finding). ``prompts`` holds
    the embedded zero-shot prompts of this modality, written by the same stage's text encoder.
    ``origin`` says of what they were made, in plain values, so that a run knows its own.
    """

    modality: str
    split: str
    image: np.ndarray
    text: np.ndarray
    labels: list[str]
    ids: list[str]
    prompts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    simulated: bool = False
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"{self.modality}/{self.split}"
        self.image = as_unit(self.image, f"{where} image embeddings")
        self.text = as_unit(self.text, f"{where} text embeddings")
        if len(self.text) and self.image.shape != self.text.shape:
            raise ValueError(
                f"{where}: image {self.image.shape} and text {self.text.shape} embeddings differ "
                "in shape; both towers must end in the shared width"
            )
        for name, values in (("labels", self.labels), ("ids", self.ids)):
            if len(values) != len(self.image):
                raise ValueError(f"{where}: {len(values)} {name} for {len(self.image)} rows")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{where}: a record id occurs twice")
        self.prompts = {
            kind: {
                label: as_unit(rows, f"{where} {kind} prompts of {label}")
                for label, rows in classes.items()
            }
            for kind, classes in self.prompts.items()
        }

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: Path | str) -> None:
        """Write atomically, so that a killed run leaves no half file behind."""
        import torch

        # safetensors stores raw memory: a view with strides would be written in the wrong order
        arrays = {
            "image": np.ascontiguousarray(self.image),
            "text": np.ascontiguousarray(self.text),
        }
        for kind, classes in self.prompts.items():
            for label, rows in classes.items():
                arrays[f"prompt/{kind}/{label}"] = np.ascontiguousarray(rows)
        meta = {
            "modality": self.modality,
            "split": self.split,
            "labels": self.labels,
            "ids": self.ids,
            "simulated": self.simulated,
            "origin": self.origin,
        }
        header = {"format": _FORMAT, "m3bind": json.dumps(meta)}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: Path | str) -> "EmbeddingSet":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise M3BindError(
                f"{path} cannot be read as embeddings ({error}); run `m3bind embed` again"
            ) from error
        if header.get("format") != _FORMAT:
            raise M3BindError(f"{path} is not an m3bind embedding file; run `m3bind embed`")
        prompts: dict[str, dict[str, np.ndarray]] = {}
        for key, value in arrays.items():
            if key.startswith("prompt/"):
                _, kind, label = key.split("/", 2)
                prompts.setdefault(kind, {})[label] = value
        meta = json.loads(header["m3bind"])
        return cls(image=arrays["image"], text=arrays["text"], prompts=prompts, **meta)


def save_stage(root: Path | str, stage: str, sets: Sequence[EmbeddingSet]) -> None:
    """Write ``<root>/<stage>/<modality>-<split>.safetensors`` for every set."""
    for item in sets:
        item.save(stage_path(root, stage, item.modality, item.split))


def load_stage(root: Path | str, stage: str, split: str = "test") -> dict[str, EmbeddingSet]:
    """All modalities of one stage and split, by modality; an empty dict where none was written."""
    found = sorted((Path(root) / stage).glob(f"*-{split}.safetensors"))
    sets = [EmbeddingSet.load(path) for path in found]
    return {item.modality: item for item in sets}


def stage_path(root: Path | str, stage: str, modality: str, split: str) -> Path:
    """Where `save_stage` writes one set of a stage."""
    return Path(root) / stage / f"{modality}-{split}.safetensors"
