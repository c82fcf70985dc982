"""WebDataset shards with an index for DALI, and the ``dataset.yaml`` that describes them.

``<root>/<modality>/<split>/<name>-<modality>-<split>-000000.tar``, and beside it ``.idx`` and
``.sha256`` (as ``sha256sum`` writes and checks it). A shard appears under its name only when it is
complete.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from m3bind.data.constants import KINDS, SPLITS
from m3bind.data.records import Record
from m3bind.errors import M3BindError
from m3bind.files import atomic_write, partial_path

AGAIN = "remove the shard, and write it again with m3bind prepare (or phantom)"
_BLOCK = 512


@dataclass(kw_only=True, slots=True)
class ModalityInfo:
    """What one modality of a data set is and can show."""

    kind: str
    labels: list[str] = field(default_factory=list)
    prompts: dict[str, dict[str, list[str]]] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Dataset:
    """``dataset.yaml``: labels, modalities and prompts of the shards beside it."""

    root: Path
    name: str
    simulated: bool
    labels: list[str]
    modalities: dict[str, ModalityInfo]
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, root: str | Path) -> "Dataset":
        """Read and check ``<root>/dataset.yaml``; raises M3BindError, naming file and key."""
        import yaml

        root = Path(root)
        path = root / "dataset.yaml"
        if not path.is_file():
            raise M3BindError(
                f"no data set in {root} (no dataset.yaml): make one with m3bind phantom or prepare"
            )
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
            modalities = {
                name: ModalityInfo(**spec) for name, spec in raw.pop("modalities").items()
            }
            found = cls(
                root=root, name=raw.pop("name"), simulated=bool(raw.pop("simulated")),
                labels=list(raw.pop("labels")), modalities=modalities, extra=raw,
            )  # fmt: skip
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise M3BindError(f"{path} is not a data set's description: {error}") from None
        for name, info in modalities.items():
            if info.kind not in KINDS:
                raise M3BindError(f"{path}: {name}: kind {info.kind!r} is not {', '.join(KINDS)}")
            unknown = sorted(set(info.labels) - set(found.labels))
            if unknown:
                raise M3BindError(f"{path}: {name}: label {unknown[0]!r} is not among 'labels'")
            for group, by_label in info.prompts.items():
                missing = [label for label in info.labels if label not in by_label]
                if missing:
                    raise M3BindError(
                        f"{path}: modalities.{name}.prompts.{group} has no prompt for the label "
                        f"{missing[0]!r}: write one, or leave {group} out"
                    )
        return found

    def write(self) -> None:
        """Write ``dataset.yaml``, atomically; do it last, as it makes the data set one."""
        import yaml

        content = {
            "name": self.name, "simulated": self.simulated, "labels": self.labels,
            "modalities": {name: asdict(info) for name, info in self.modalities.items()},
            **self.extra,
        }  # fmt: skip
        with atomic_write(self.root / "dataset.yaml") as partial:
            partial.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


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
        if kind is None:
            self.finish_shard()
        elif self._shard is not None:
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
            start = self.tar.offset + _BLOCK
            self.tar.addfile(info, io.BytesIO(content))
            line.append(f"{extension} {start} {len(content)} {info.name}")
        self.index.append(" ".join(line))
        self.samples += 1

    def finish(self) -> None:
        self.tar.close()
        index = self.path.with_suffix(".idx")
        index.write_text(f"v1.2 {self.samples}\n" + "".join(f"{line}\n" for line in self.index))
        checksum = self.path.with_suffix(".sha256")
        checksum.write_text(f"{_sha256(self.partial)}  {self.path.name}\n")
        os.replace(self.partial, self.path)

    def drop(self) -> None:
        self.tar.close()
        self.partial.unlink(missing_ok=True)


def shard_paths(root: str | Path, modality: str, split: str) -> list[Path]:
    """The shards of a split, in order; empty where there are none."""
    return sorted((Path(root) / modality / split).glob("*.tar"))


def shards_content(paths: Iterable[Path]) -> str:
    """Sixteen hexadecimal digits that change with any byte of the shards or of their indexes."""
    digest = hashlib.sha256()
    for path in paths:
        index = path.with_suffix(".idx")
        listed = _sha256(index) if index.is_file() else "none"
        digest.update(f"{path.name} {_checksum(path)} {listed}\n".encode())
    return digest.hexdigest()[:16]


def _checksum(path: Path) -> str:
    """The SHA-256 of a shard: as written beside it, or computed where that is missing or older."""
    written = path.with_suffix(".sha256")
    if written.is_file() and written.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        words = written.read_text().split()
        if len(words) == 2 and words[1] == path.name:
            return words[0]
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(shard: Path) -> list[dict[str, tuple[int, int]]]:
    """What a shard's index lists: for each sample ``{extension: (start, bytes)}``.

    Raises M3BindError for an index that is missing or not whole.
    """
    path = shard.with_suffix(".idx")
    try:
        heading, *lines = path.read_text().splitlines()
        version, number = heading.split()
        samples = []
        for line in lines:
            words = line.split()
            parts = zip(words[::4], words[1::4], words[2::4], strict=True)
            samples.append({name: (int(start), int(size)) for name, start, size in parts})
        if version != "v1.2" or int(number) != len(samples):
            raise ValueError(f"{heading!r} over {len(samples)} samples")
    except FileNotFoundError:
        raise M3BindError(f"{path} is missing: {AGAIN}") from None
    except ValueError as error:
        raise M3BindError(f"{path} is not a whole index (v1.2): {error}: {AGAIN}") from None
    return samples


def whole_samples(shard: Path) -> int:
    """The samples of a shard; raises M3BindError if it is not as long as its index says."""
    samples = read_index(shard)
    end = max((start + size for parts in samples for start, size in parts.values()), default=0)
    blocks = -(-end // _BLOCK) + 2  # two empty ones end a tar file
    want = -(-blocks * _BLOCK // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    found = shard.stat().st_size
    if found != want:
        raise M3BindError(f"{shard}: {found} bytes, but its index says {want}: {AGAIN}")
    return len(samples)


def iter_samples(
    path: Path, wanted: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of one shard; only the ``wanted`` components are read.

    Raises M3BindError, naming the shard and the last key, where the file ends too early.
    """
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name, _, extension = member.name.partition(".")
                if parts and name != key:
                    yield key, parts
                    parts = {}
                key = name
                file = tar.extractfile(member)
                if file is not None:
                    keep = not wanted or extension in wanted
                    parts[extension] = file.read() if keep else b""
                    if keep and len(parts[extension]) != member.size:
                        raise EOFError("it ends in the middle of a sample")
            if tar.offset > path.stat().st_size:
                raise EOFError("it ends in the middle of a sample")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise M3BindError(
            f"{path}: the shard cannot be read beyond {key or 'its beginning'} ({error}): {AGAIN}"
        ) from None
    if parts:
        yield key, parts


def iter_records(root: str | Path, modality: str, split: str) -> Iterator[Record]:
    """The records of a split, in the order of the shards.

    Raises M3BindError for a shard or a sample that is not as it was written.
    """
    for path in shard_paths(root, modality, split):
        count = 0
        for key, parts in iter_samples(path):
            count += 1
            yield _record(path, key, parts)
        # A tar that was cut between two samples looks whole.
        index = path.with_suffix(".idx")
        listed = index.read_text().split(maxsplit=2)[1:2] if index.is_file() else ["no"]
        if listed != [str(count)]:
            raise M3BindError(
                f"{path}: {count} samples, but its index ({index.name}) lists "
                f"{(listed or ['none'])[0]}: {AGAIN}"
            )


def iter_reports(root: str | Path, modality: str, split: str) -> Iterator[str]:
    """The reports of a split, in the order of the shards, without reading the images."""
    for path in shard_paths(root, modality, split):
        for key, parts in iter_samples(path, ("txt",)):
            if "txt" not in parts:
                raise M3BindError(f"{path}: sample {key} has no report (txt)")
            yield parts["txt"].decode()


def _record(path: Path, key: str, parts: dict[str, bytes]) -> Record:
    try:
        meta = json.loads(parts.pop("json"))
        report = parts.pop("txt").decode()
        raw_shape = parts.pop("shape", None)
        shape = None if raw_shape is None else tuple(np.frombuffer(raw_shape, "<i8").tolist())
        (extension, payload), *rest = parts.items()
        kind = {"hu": "volume", "uv": "signal"}.get(extension, "image2d")
        checksum = meta.pop("sha256")
        meta["labels"] = tuple(meta["labels"])
        if "spacing_mm" in meta:
            meta["spacing_mm"] = tuple(meta["spacing_mm"])
        record = Record(
            kind=kind, payload=payload, extension=extension, shape=shape, report=report, **meta
        )
    except (KeyError, ValueError, TypeError) as error:
        raise M3BindError(f"{path}: sample {key} is not whole: {error}") from None
    if rest or hashlib.sha256(payload).hexdigest() != checksum:
        raise M3BindError(f"{path}: sample {key}: its bytes do not match its checksum: {AGAIN}")
    return record


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
