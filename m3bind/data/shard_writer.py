"""Writing WebDataset shards, each with an index for DALI and its checksum.

``<root>/<modality>/<split>/<name>-<modality>-<split>-000000.tar``, and beside it ``.idx`` and
``.sha256`` (as ``sha256sum`` writes and checks it). A shard appears under its name only when it is
complete.
"""

import io
import json
import os
import tarfile
from pathlib import Path
from types import TracebackType

import numpy as np

from m3bind.data.constants import SPLITS
from m3bind.data.records import Record
from m3bind.data.shards import BLOCK, sha256_of
from m3bind.files import partial_path


class ShardWriter:
    """Writes records into shards of ``max_samples``; to be used as a context manager.

    Raises ValueError for a record of another modality or split, or an id written before.
    """

    def __init__(
        self, root: str | Path, name: str, modality: str, split: str, max_samples: int = 512,
        first: int = 0,
    ) -> None:  # fmt: skip
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        self.folder = Path(root) / modality / split
        self.stem = f"{name}-{modality}-{split}"
        self.modality, self.split, self.max_samples = modality, split, max_samples
        self.written = 0
        self._number, self._ids = first, set[str]()
        self._shard: _Shard | None = None

    def write(self, record: Record) -> None:
        if (record.modality, record.split) != (self.modality, self.split):
            raise ValueError(
                f"{record.id} is of {record.modality}/{record.split}, the shard of "
                f"{self.modality}/{self.split}"
            )
        if record.id in self._ids:
            raise ValueError(f"the id {record.id} was written before")
        self._ids.add(record.id)
        if self._shard is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._shard = _Shard(self.folder / f"{self.stem}-{self._number:06d}.tar")
            self._number += 1
        self._shard.add(record)
        self.written += 1
        if self._shard.samples >= self.max_samples:
            self.finish_shard()

    def finish_shard(self) -> None:
        if self._shard is not None:
            self._shard.finish()
            self._shard = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            if kind is None:
                self.finish_shard()
        finally:
            if self._shard is not None:
                self._shard.drop()


class _Shard:
    def __init__(self, path: Path) -> None:
        self.path, self.samples, self.index = path, 0, list[str]()
        self.partial = partial_path(path)
        self.tar = tarfile.open(  # noqa: SIM115 (finish or drop closes it)
            self.partial, "w", format=tarfile.USTAR_FORMAT
        )

    def add(self, record: Record) -> None:
        parts = {record.extension: record.payload, "txt": record.report.encode()}
        parts["json"] = json.dumps(record.meta(), sort_keys=True).encode()
        if record.shape is not None:
            parts["shape"] = np.asarray(record.shape, "<i8").tobytes()
        line = []
        for extension, content in parts.items():
            info = tarfile.TarInfo(f"{record.id}.{extension}")
            info.size, info.mode = len(content), 0o644
            start = self.tar.offset + BLOCK
            self.tar.addfile(info, io.BytesIO(content))
            line.append(f"{extension} {start} {len(content)} {info.name}")
        self.index.append(" ".join(line))
        self.samples += 1

    def finish(self) -> None:
        self.tar.close()
        index = self.path.with_suffix(".idx")
        index.write_text(f"v1.2 {self.samples}\n" + "".join(f"{line}\n" for line in self.index))
        checksum = self.path.with_suffix(".sha256")
        checksum.write_text(f"{sha256_of(self.partial)}  {self.path.name}\n")
        os.replace(self.partial, self.path)

    def drop(self) -> None:
        try:
            self.tar.close()
        except OSError:
            pass  # where the space has run out, closing fails as well: the first error tells it
        finally:
            self.partial.unlink(missing_ok=True)
