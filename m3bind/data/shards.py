"""Reading shards: their index and content, their samples, their reports.

`m3bind.data.shard_writer` says how they are laid out, `m3bind.data.audit` checks a whole data set.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from m3bind.data.records import Record
from m3bind.errors import M3BindError

AGAIN = "remove the shard, and write it again with m3bind prepare (or phantom)"
BLOCK = 512  # bytes; a tar file consists of such blocks


def shard_paths(root: str | Path, modality: str, split: str) -> list[Path]:
    """The shards of a split, in order; empty where there are none."""
    return sorted((Path(root) / modality / split).glob("*.tar"))


def shards_content(paths: Iterable[Path]) -> str:
    """Sixteen hexadecimal digits that change with any byte of the shards or of their indexes."""
    digest = hashlib.sha256()
    for path in paths:
        index = path.with_suffix(".idx")
        listed = sha256_of(index) if index.is_file() else "none"
        digest.update(f"{path.name} {_checksum(path)} {listed}\n".encode())
    return digest.hexdigest()[:16]


def _checksum(path: Path) -> str:
    """The SHA-256 of a shard: as written beside it, or computed where that is missing or older."""
    written = path.with_suffix(".sha256")
    if written.is_file() and written.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        words = written.read_text(errors="replace").split()
        if len(words) == 2 and words[1] == path.name:
            return words[0]
    return sha256_of(path)


def sha256_of(path: Path) -> str:
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
    blocks = -(-end // BLOCK) + 2  # two empty ones end a tar file
    want = -(-blocks * BLOCK // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
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
        listed = len(read_index(path))
        if listed != count:
            raise M3BindError(f"{path}: {count} samples, but its index lists {listed}: {AGAIN}")


def iter_reports(root: str | Path, modality: str, split: str) -> Iterator[str]:
    """The reports of a split, in the order of the shards, without reading the images."""
    for path in shard_paths(root, modality, split):
        for key, parts in iter_samples(path, ("txt",)):
            if "txt" not in parts:
                raise M3BindError(f"{path}: sample {key} has no report (txt)")
            try:
                yield parts["txt"].decode()
            except UnicodeDecodeError as error:
                raise M3BindError(f"{path}: the report of sample {key}: {error}") from None


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
