"""From a manifest of medical files to shards: read in parallel, written in order, all or nothing.

Shards hold a salted hash instead of the patient and never a file's name, which may carry one too:
``source`` has the file's sha256, its reader, what was done to it, and the versions of the
packages. The salt is random, lies in ``<out>/.salt`` (mode 600: keep it, and do not hand it on),
and comes from the environment variable M3BIND_SALT where that is set.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3bind.bars import progress_bar
from m3bind.data.constants import SPLITS
from m3bind.data.dataset import Dataset
from m3bind.data.description import Description
from m3bind.data.manifest import Entry, read_manifest
from m3bind.data.records import Record
from m3bind.data.shard_writer import ShardWriter
from m3bind.data.workers import Job, Outcome, run
from m3bind.errors import M3BindError
from m3bind.files import atomic_write

MADE_BY = "m3bind prepare"
REJECTS, SALT, UNFINISHED, DATASET = "rejects.jsonl", ".salt", ".unfinished", "dataset.yaml"
_FEW = 4  # files that are not worth the start of processes


@dataclass(kw_only=True, slots=True)
class PrepareResult:
    """How many samples stand in the shards, and how many files do not."""

    written: int
    rejected: int


def prepare(
    manifest: Path,
    out: Path,
    *,
    name: str,
    workers: int | None = None,
    progress: bool = True,
    description: Path | None = None,
) -> PrepareResult:
    """Write the manifest's files as shards and dataset.yaml into ``out``.

    See `m3bind.data.manifest` for the columns and `m3bind.data.description` for the YAML. A file
    that cannot be read becomes one line of ``<out>/rejects.jsonl`` (the manifest's line, reason,
    remedy; no path, which may name the patient), and the rest goes on. ``out`` must be new, empty,
    or an earlier result, which is replaced once
    the new one is complete. ``workers`` are processes, one a core by default; they do not change
    the bytes.

    Raises M3BindError for faults of the manifest, the description or ``out`` before anything is
    written, and where no file at all could be read.
    """
    manifest, out = Path(manifest), Path(out)
    if workers is not None and workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    described = Description.load(description)
    kinds = described.kinds()
    entries = read_manifest(manifest, kinds)
    _check_labels(manifest, entries, described)
    _claim(out)
    staging = out / UNFINISHED
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "prepared"
    salt = _salt(out)
    outcomes = _outcomes(manifest, entries, kinds, stem, salt, workers)
    bar = progress_bar(
        outcomes, total=len(entries), desc="prepare", unit="file", disable=not progress
    )
    try:
        written, seen, rejects = _write(bar, staging, stem)
        _write_rejects(staging / REJECTS, rejects)
        if not written:
            if rejects:
                os.replace(staging / REJECTS, out / REJECTS)
            raise M3BindError(
                f"none of the {len(rejects)} files in {manifest} could be read, the first because "
                f"{rejects[0]['reason']}; all reasons are in {out / REJECTS}"
            )
        dataset = described.dataset(staging, name, seen)
        dataset.extra = {"made_by": MADE_BY, "rejected": len(rejects)}
        dataset.write()
        _put_in_place(staging, out)
    finally:
        outcomes.close()
        bar.close()
        shutil.rmtree(staging, ignore_errors=True)
    return PrepareResult(written=written, rejected=len(rejects))


def _check_labels(manifest: Path, entries: list[Entry], described: Description) -> None:
    for entry in entries:
        for label in entry.labels:
            fault = entry.problem is None and described.check(entry.modality, label)
            if fault:
                raise M3BindError(f"{manifest}, line {entry.line}: label {fault}")


def _salt(out: Path) -> bytes:
    given = os.environ.get("M3BIND_SALT")
    if given:
        return given.encode()
    path = out / SALT
    if not path.is_file():
        with atomic_write(path) as partial:
            partial.write_text(secrets.token_hex(32))
        path.chmod(0o600)
    salt = path.read_text().strip()
    if not salt:
        raise M3BindError(f"{path} is empty: restore it, or remove it and prepare everything anew")
    return salt.encode()


def pseudonym(salt: bytes, patient: str) -> str:
    """The name of a patient in the shards: the same for the same salt, and not to be undone."""
    return "p" + hashlib.sha256(salt + b"\0" + patient.encode()).hexdigest()[:16]


def _outcomes(
    manifest: Path,
    entries: list[Entry],
    kinds: dict[str, str],
    stem: str,
    salt: bytes,
    workers: int | None,
) -> Generator[Outcome, None, None]:
    """The outcome of every entry, in the manifest's order."""
    jobs = [
        Job(
            entry=entry,
            path=manifest.parent / entry.path,
            kind=kinds[entry.modality],
            prefix=f"{stem}-{entry.modality}-{entry.line:06d}",
            pseudonym=pseudonym(salt, entry.patient),
        )
        for entry in entries
        if entry.problem is None
    ]
    done = run(jobs, 1 if len(jobs) < _FEW else workers or len(os.sched_getaffinity(0)))
    try:
        for entry in entries:
            yield Outcome(entry=entry, problem=entry.problem) if entry.problem else next(done)
    finally:
        done.close()


def _write(
    outcomes: Iterator[Outcome], root: Path, stem: str
) -> tuple[int, dict[str, set[str]], list[dict[str, Any]]]:
    """Write the shards; returns samples, labels a modality, and what was rejected."""
    written, seen, rejects = 0, dict[str, set[str]](), list[dict[str, Any]]()
    splits: dict[bytes, str] = {}
    with ExitStack() as stack:
        writers: dict[tuple[str, str], ShardWriter] = {}
        for outcome in outcomes:
            entry = outcome.entry
            problem = outcome.problem or _twin(outcome.records, splits)
            if problem:
                reason, remedy = problem
                rejects.append({"line": entry.line, "reason": reason, "remedy": remedy})
                continue
            for record in outcome.records:
                key = (record.modality, record.split)
                if key not in writers:
                    writers[key] = stack.enter_context(ShardWriter(root, stem, *key))
                writers[key].write(record)
                written += 1
                seen.setdefault(record.modality, set()).update(record.labels)
    return written, seen, rejects


def _twin(records: list[Record], splits: dict[bytes, str]) -> tuple[str, str] | None:
    """Refuse what an earlier line put into another split: a leak under two patients' names."""
    for record in records:
        other = splits.setdefault(hashlib.sha256(record.payload).digest(), record.split)
        if other != record.split:
            return (
                f"the same image, volume or signal stands in the split {other} already",
                "keep it in one split; look whether the two patients are one",
            )
    return None


def _write_rejects(path: Path, rejects: list[dict[str, Any]]) -> None:
    if rejects:
        lines = (json.dumps(reject, ensure_ascii=False) for reject in rejects)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _claim(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier result."""
    if out.exists() and not out.is_dir():
        raise M3BindError(f"{out} is a file: choose a folder for the shards")
    if not out.is_dir() or not any(out.iterdir()):
        return
    own = (out / SALT).is_file() or (out / UNFINISHED).is_dir()
    if (out / DATASET).is_file():
        own = Dataset.load(out).extra.get("made_by") == MADE_BY
    foreign = [] if own else sorted(out.iterdir())[:1]
    for entry in sorted(out.iterdir()):
        if entry.name in (SALT, REJECTS, UNFINISHED, DATASET):
            continue
        if not entry.is_dir():
            foreign.append(entry)
        foreign += [e for e in entry.rglob("*") if not _ours(e.relative_to(entry), entry.name)]
    if foreign:
        raise M3BindError(
            f"{out} is not empty, and {foreign[0].relative_to(out)} is not of an earlier "
            "m3bind prepare: choose another, or an empty, folder"
        )


def _ours(path: Path, modality: str) -> bool:
    """``train`` or ``train/<stem>-<modality>-train-000000.tar`` within a modality's folder."""
    split = path.parts[0]
    if split not in SPLITS or len(path.parts) == 1:
        return split in SPLITS
    return bool(
        re.fullmatch(rf".+-{re.escape(modality)}-{split}-\d{{6}}\.(tar|idx|sha256)", path.name)
    )


def _put_in_place(staging: Path, out: Path) -> None:
    """Replace an earlier result by the new one; dataset.yaml, which makes it one, comes last."""
    (out / DATASET).unlink(missing_ok=True)
    for entry in sorted(out.iterdir()):
        if entry.name == REJECTS:
            entry.unlink()
        elif entry.is_dir() and entry.name != UNFINISHED:
            shutil.rmtree(entry)
    for entry in sorted(staging.iterdir(), key=lambda e: e.name == DATASET):
        os.replace(entry, out / entry.name)
