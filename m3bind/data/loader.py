"""Batches out of shards, by DALI: shuffled, sharded over processes, resumable to the bit."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3bind.data.constants import EXTENSIONS
from m3bind.data.damage import damaged, find_damage
from m3bind.data.preprocess import Preprocess
from m3bind.data.shards import read_index, shard_paths, shards_content
from m3bind.errors import M3BindError

_DALI_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)  # as its operators raise them


@dataclass(kw_only=True, slots=True)
class Batch:
    """Samples of one modality, with the report and the metadata of each."""

    images: Tensor  # float32 [B, C, H, W], [B, C, D, H, W], [B, 12, T], or features [B, width]
    reports: list[str]
    meta: list[dict[str, Any]]
    modality: str

    def __len__(self) -> int:
        return len(self.reports)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its images on ``device``."""
        return replace(self, images=self.images.to(device, non_blocking=True))


class Loader:
    """Iterate over `Batch`es of one modality and split, as `preprocess` wants them.

    With ``train=True`` iterating never ends: full batches, shuffled anew each epoch, augmented,
    and a split smaller than a batch is gone through again. With ``train=False`` it is one pass
    in the order of the shards, and the last batch may be smaller. ``augment`` None follows
    ``train``.

    ``device_id`` None decodes and computes on the CPU, a number on that GPU, where the images
    then are (documented by DALI; not yet run on a GPU). ``shard_id`` of ``num_shards`` is this
    process's part. `state()` after a batch, given as ``state=`` or to `load_state`, goes on with
    the next batch bit for bit, augmentation included.

    Each sample's payload is compared with its checksum the first time it is read. Raises
    M3BindError, naming the shard and the key, for a sample that is not as it was written.
    """

    def __init__(
        self,
        root: str | Path,
        modality: str,
        split: str,
        preprocess: Preprocess,
        batch_size: int,
        *,
        train: bool,
        augment: bool | None = None,
        device_id: int | None = None,
        shard_id: int = 0,
        num_shards: int = 1,
        seed: int = 0,
        num_threads: int = 1,
        prefetch: int = 2,
        state: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if not 0 <= shard_id < num_shards:
            raise ValueError(f"shard_id {shard_id} must be from 0 to num_shards - 1 ({num_shards})")
        self.root, self.modality, self.split = Path(root), modality, split
        self.preprocess, self.batch_size, self.train = preprocess, batch_size, train
        self.augment = train if augment is None else augment
        self.device_id, self.shard_id, self.num_shards = device_id, shard_id, num_shards
        self.seed, self.num_threads, self.prefetch = seed, num_threads, prefetch
        folder = self.root / modality / split
        self.paths = shard_paths(self.root, modality, split)
        if not self.paths:
            raise M3BindError(f"no shards (*.tar) in {folder}: run m3bind phantom or prepare first")
        self.index_paths = [path.with_suffix(".idx") for path in self.paths]
        total = sum(len(read_index(path)) for path in self.paths)
        # As DALI divides a data set over processes.
        first, last = (total * part // num_shards for part in (shard_id, shard_id + 1))
        self.num_samples = last - first
        if self.num_samples == 0:
            raise M3BindError(f"{folder} holds {total} samples: too few for {num_shards} processes")
        if not train:  # DALI fills the last batch up, and would decode each copy
            self.batch_size = min(batch_size, self.num_samples)
        self._total = total
        self._pipeline: Any = None
        self._batches = 0  # handed out since the stream, or in one pass since its start, began
        self._salt = 0  # of a stream that began in a training's middle
        self._verified: set[str] = set()
        self._restored: bytes | None = None
        self._content: str | None = None
        if state is not None:
            self.load_state(state)

    def __len__(self) -> int:
        """Batches an epoch, the last of them perhaps not full."""
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self.train:
            while True:
                yield self._next(self.batch_size)
        if self._batches % len(self):  # an earlier pass was left in its middle
            self._pipeline = None
        self._batches = 0
        for index in range(len(self)):
            yield self._next(min(self.batch_size, self.num_samples - index * self.batch_size))

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the batch that was handed out last (training only)."""
        if not self.train:
            raise ValueError("only a training loader has a state: one pass starts anew")
        checkpoint = self._built().checkpoint()
        return {
            "stream": checkpoint,
            "batches": self._batches,
            "salt": self._salt,
            "content": self.content(),
            "signature": self._signature(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises M3BindError if data or settings changed since."""
        if not self.train:
            raise ValueError("only a training loader has a state: one pass starts anew")
        if state["signature"] != self._signature():
            raise M3BindError(
                f"the {self.modality} shards in {self.root} or their loader's settings (batch "
                "size, seed, preprocessing, DALI's version) are not those of the checkpoint: "
                "restore them, or start without resuming"
            )
        self._restored, self._batches, self._pipeline = state["stream"], state["batches"], None
        self._salt = state["salt"]

    def load_state_of_others(self, state: dict[str, Any], salt: int) -> None:
        """Begin a new stream, unlike any before for a new ``salt``: where another number of
        processes stood in their parts of the shards says nothing of this one's.

        Raises M3BindError if the shards changed since.
        """
        if state["content"] != self.content():
            raise M3BindError(
                f"the {self.modality} shards in {self.root} are not those of the checkpoint: "
                "restore them, or start without resuming"
            )
        self._restored, self._batches, self._pipeline = None, 0, None
        self._salt = salt

    def _signature(self) -> str:
        from importlib.metadata import distributions

        versions = sorted(
            f"{d.name}=={d.version}" for d in distributions(name="nvidia-dali-cuda130")
        ) or ["unknown"]
        parts = [
            self.content(),
            [self.modality, self.split, self.preprocess.fingerprint(), self.batch_size],
            [self.augment, self.shard_id, self.num_shards, self.seed, versions],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def content(self) -> str:
        """`shards_content` of this split, as it was when first asked for."""
        if self._content is None:
            self._content = shards_content(self.paths)
        return self._content

    def _built(self) -> Any:
        if self._pipeline is None:
            try:
                from m3bind.data.pipelines import build_pipeline
            except ImportError as error:
                raise M3BindError(
                    f"loading needs NVIDIA DALI ({error}): install m3bind[train]"
                ) from None
            try:
                self._pipeline = build_pipeline(
                    self.paths,
                    self.index_paths,
                    self.modality,
                    self.preprocess,
                    batch_size=self.batch_size,
                    num_samples=self._total,
                    shuffle=self.train,
                    augment=self.augment,
                    device_id=self.device_id,
                    shard_id=self.shard_id,
                    num_shards=self.num_shards,
                    seed=self._stream_seed(),
                    num_threads=self.num_threads,
                    prefetch=self.prefetch,
                    checkpoint=self._restored,
                )
            except _DALI_ERRORS as error:
                raise self._explain(error) from None
        return self._pipeline

    def _next(self, keep: int) -> Batch:
        pipeline = self._built()
        try:
            images, payloads, reports, metadata = pipeline.run()
        except _DALI_ERRORS as error:
            raise self._explain(error) from None
        meta = [json.loads(bytes(metadata.at(i))) for i in range(keep)]
        for i, sample in enumerate(meta):
            if sample["id"] not in self._verified:
                payload = np.asarray(payloads.at(i)).tobytes()
                if hashlib.sha256(payload).hexdigest() != sample["sha256"]:
                    raise self._damaged(sample["id"], "its bytes do not match its checksum")
                self._verified.add(sample["id"])
        self._batches += 1
        return Batch(
            images=_to_torch(images, self.device_id)[:keep],
            reports=[bytes(reports.at(i)).decode() for i in range(keep)],
            meta=meta,
            modality=self.modality,
        )

    def _stream_seed(self) -> int:
        """Of its own for each process, or they would all augment alike."""
        if not self.shard_id and not self._salt:
            return self.seed
        parts = f"{self.seed}/{self.modality}/{self.shard_id}/{self._salt}"
        return int.from_bytes(hashlib.sha256(parts.encode()).digest()[:4], "little") >> 1

    def _explain(self, error: Exception) -> M3BindError:
        """Turn DALI's traceback into the shard, the sample and the remedy."""
        self._pipeline = None  # it cannot be run again after an error
        damage = find_damage(self.paths, EXTENSIONS[self.preprocess.kind])
        if damage is not None:
            return damage
        lines = str(error).partition("encountered:")[2].split("\n") + str(error).split("\n")
        reason = next((line.strip() for line in lines if line.strip()), "no reason given")
        return M3BindError(
            f"DALI failed on the {self.modality} shards in {self.paths[0].parent}, though every "
            f"sample is whole: {reason}"
        )

    def _damaged(self, key: str, reason: str) -> M3BindError:
        """Name the shard in which ``key`` stands."""
        for path in self.index_paths:
            if any(word.startswith(f"{key}.") for word in path.read_text().split()):
                return damaged(path.with_suffix(".tar"), key, reason)
        return damaged(self.paths[0].parent, key, reason)


def _to_torch(images: Any, device_id: int | None) -> Tensor:
    """Copy a dense DALI batch, whose memory is used again by the next run."""
    if device_id is None:
        return torch.from_numpy(np.array(images.as_array()))
    from nvidia.dali.plugin.pytorch import feed_ndarray

    dense = images.as_tensor()
    device = torch.device("cuda", device_id)
    copy = torch.empty(tuple(dense.shape()), dtype=torch.float32, device=device)
    feed_ndarray(dense, copy, cuda_stream=torch.cuda.current_stream(device))
    return copy
