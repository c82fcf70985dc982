"""Features of frozen trunks: computed once for each image, and handed out again as batches."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3bind.data.loader import Batch
from m3bind.errors import M3BindError
from m3bind.files import write_tensors


@dataclass(kw_only=True, slots=True)
class Features:
    """What a frozen trunk gives for the images of one split: ``values`` float32 [N, width].

    ``fingerprint`` names the trunk's weights, its preprocessing and the shards; `load` takes no
    other.
    """

    modality: str
    values: Tensor
    reports: list[str]
    meta: list[dict[str, Any]]
    fingerprint: str

    @classmethod
    def compute(
        cls, batches: Iterable[Batch], trunk: Callable[[Tensor], Tensor], fingerprint: str
    ) -> "Features":
        """One pass: ``trunk`` takes the images of a batch and gives [B, width]."""
        values: list[Tensor] = []
        reports: list[str] = []
        meta: list[dict[str, Any]] = []
        with torch.no_grad():
            for batch in batches:
                values.append(trunk(batch.images).float().cpu())
                reports += batch.reports
                meta += batch.meta
        return cls(
            modality=batch.modality,
            values=torch.cat(values),
            reports=reports,
            meta=meta,
            fingerprint=fingerprint,
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        text = json.dumps({"reports": self.reports, "meta": self.meta})
        tensors = {
            "values": self.values.contiguous(),
            "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
        }
        write_tensors(path, tensors, {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: Path, modality: str, fingerprint: str) -> "Features | None":
        """The saved features; None where there are none, or not of this ``fingerprint``."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != fingerprint:
                    return None
                values = file.get_tensor("values")
                text = json.loads(file.get_tensor("text").numpy().tobytes())
        except SafetensorError:
            return None  # cut off, or not of ours: it is written again
        return cls(modality=modality, values=values, fingerprint=fingerprint, **text)


class FeatureLoader:
    """As `m3bind.data.loader.Loader`, over `Features`: each batch's ``images`` are features.

    The order of an epoch depends on ``seed`` and its number alone, so the number of batches is
    all of the state. Of a training batch, which all processes hold together, this one gets the
    rows of ``part``: whatever their number, the batches are the same.
    """

    def __init__(
        self,
        features: Features,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        part: slice = slice(None),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self._part = range(batch_size)[part]
        self.features, self.batch_size, self.train, self.seed = features, batch_size, train, seed
        self.num_samples = len(features.values)
        self._batches = 0
        self._order: tuple[int, list[int]] = (-1, [])  # of the epoch that was asked for last

    def __len__(self) -> int:
        """Batches an epoch, the last of them perhaps not full."""
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if not self.train:
            for start in range(0, self.num_samples, self.batch_size):
                stop = min(start + self.batch_size, self.num_samples)
                yield self._batch(list(range(start, stop)))
            return
        while True:
            start = self._batches * self.batch_size
            rows = [self._row(start + place) for place in self._part]
            self._batches += 1
            yield self._batch(rows)

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the batch that was handed out last (training only)."""
        return {"stream": b"", "batches": self._batches, "signature": self._signature()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises M3BindError for other features or settings."""
        if state["signature"] != self._signature():
            raise M3BindError(
                f"the {self.features.modality} features, or their loader's batch size or seed, are "
                "not those of the checkpoint: restore them, or start without resuming"
            )
        self._batches = state["batches"]

    def load_state_of_others(self, state: dict[str, Any], salt: int) -> None:
        """As `load_state`: the batches are the same for any number of processes."""
        self.load_state(state)

    def _signature(self) -> str:
        return f"{self.features.fingerprint}/{self.batch_size}/{self.seed}"

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, self.num_samples)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._order = (epoch, torch.randperm(self.num_samples, generator=generator).tolist())
        return self._order[1][index]

    def _batch(self, rows: list[int]) -> Batch:
        features = self.features
        return Batch(
            images=features.values[rows],
            reports=[features.reports[row] for row in rows],
            meta=[features.meta[row] for row in rows],
            modality=features.modality,
        )
