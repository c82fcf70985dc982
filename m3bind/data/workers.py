"""Reading files in processes: bounded, in order, and safe from a decoder that crashes."""

import logging
import re
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3bind.data.manifest import Entry
from m3bind.data.readers import reader_for
from m3bind.data.readers.common import (
    Reading,
    Unreadable,
    one_line,
    sha256_of,
    versions,
)
from m3bind.data.readers.identity import names_patient
from m3bind.data.records import Record
from m3bind.processes import spawned_pool

_TALKATIVE = ("pydicom", "nibabel", "nibabel.global", "tifffile", "tiffslide", "PIL")


@dataclass(kw_only=True, slots=True)
class Job:
    """One file and what becomes of it: all that a process needs."""

    entry: Entry
    path: Path
    kind: str
    prefix: str
    pseudonym: str


@dataclass(kw_only=True, slots=True)
class Outcome:
    """The records of one file, or (reason, remedy)."""

    entry: Entry
    records: list[Record] = field(default_factory=list)
    problem: tuple[str, str] | None = None


def run(jobs: list[Job], workers: int) -> Generator[Outcome, None, None]:
    """The outcome of every job, in order, with at most a few of them ahead."""
    if workers == 1:
        yield from map(read_job, jobs)
        return
    left, ahead = deque(jobs), deque[tuple[Job, Future[Outcome]]]()
    pool = spawned_pool(workers, ignore_interrupt=True)
    try:
        while left or ahead:
            # Volumes are large: what is read ahead waits in memory.
            while left and len(ahead) < 2 * workers:
                try:
                    ahead.append((left[0], pool.submit(read_job, left[0])))
                except BrokenProcessPool:
                    break
                left.popleft()
            try:
                if not ahead:
                    raise BrokenProcessPool
                outcome = ahead[0][1].result()
                ahead.popleft()
                yield outcome
            except BrokenProcessPool:
                # One of those ahead ended its process, and all others with it.
                suspects = [job for job, _ in ahead]
                ahead.clear()
                pool.shutdown()
                yield from _one_by_one(suspects)
                pool = spawned_pool(workers, ignore_interrupt=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(jobs: list[Job]) -> Iterator[Outcome]:
    """So that a process that ends tells which file it ended on."""
    pool = spawned_pool(1, ignore_interrupt=True)
    try:
        for job in jobs:
            try:
                yield pool.submit(read_job, job).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = spawned_pool(1, ignore_interrupt=True)
                reason = "the process that read the file crashed (a decoder's fault, or no memory)"
                remedy = "fetch the file again; with a very large file use fewer workers"
                yield Outcome(entry=job.entry, problem=(reason, remedy))
    finally:
        pool.shutdown(cancel_futures=True)


def read_job(job: Job) -> Outcome:
    """Read one file into records; whatever goes wrong becomes (reason, remedy)."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    problem: tuple[str, str]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Outcome(entry=job.entry, records=_records(job))
    except Unreadable as error:
        problem = (error.reason, error.remedy)
    except MemoryError:
        problem = ("it needs more memory than there is", "use fewer workers, or take a part of it")
    except Exception as error:
        # Damaged files make libraries fail in any way; one of them must not end the work.
        phrase = f"it cannot be read: {type(error).__name__}: {one_line(error)}"
        problem = (phrase, "look at the file in a viewer; if it is whole, report this")
    reason, remedy = problem
    return Outcome(entry=job.entry, problem=(_without_path(reason, job.path), remedy))


def _without_path(reason: str, path: Path) -> str:
    """Libraries name the file in their errors, or one beside it; its path may name the patient."""
    files = [path, *(path.rglob("*") if path.is_dir() else ())]
    forms = {str(form) for file in files for form in (file, file.absolute(), file.resolve())}
    forms |= {form.removesuffix(path.suffix) for form in forms}
    forms = {form for form in forms if "/" in form}  # a bare name may be any word
    forms |= {file.name for file in files if file.suffix}
    patterns = [re.escape(form) for form in sorted(forms, key=len, reverse=True)]
    if path.suffix:
        patterns.append(rf"{re.escape(path.stem)}\.\w")  # the signals of a header, say
    for pattern in patterns:
        reason = re.sub(rf"(?<!\w){pattern}[^\s'\":,;)]*", "the file", reason)
    return reason


def _records(job: Job) -> list[Record]:
    entry = job.entry
    reader = reader_for(job.path, entry.modality, job.kind)
    readings: list[Reading] = reader.read(job.path, entry.part)
    files = reader.files(job.path) if hasattr(reader, "files") else [job.path]
    source: dict[str, Any] = {
        "sha256": sha256_of(*files),
        "files": len(files),
        "reader": reader.__name__.rpartition(".")[2],
        "versions": versions(*reader.PACKAGES),
    }
    identifiers = {entry.patient, *(i for reading in readings for i in reading.identifiers)}
    if names_patient(entry.report, tuple(identifiers)):
        raise Unreadable(
            "the report names the patient", "remove names and numbers of the patient from it"
        )
    return [_record(job, reading, source) for reading in readings]


def _record(job: Job, reading: Reading, source: dict[str, Any]) -> Record:
    entry = job.entry
    values: dict[str, Any] = {
        "id": job.prefix + (f"-{reading.part}" if reading.part else ""),
        "patient": job.pseudonym,
        "modality": entry.modality,
        "split": entry.split,
        "labels": entry.labels,
        "report": entry.report,
        "simulated": False,
        "source": source | {"steps": reading.steps} | reading.where,
        "attributes": reading.attributes,
        "spacing_mm": reading.spacing_mm,
    }
    try:
        if reading.encoded is not None:
            extension, payload = reading.encoded
            return Record(kind=job.kind, extension=extension, payload=payload, **values)
        assert reading.array is not None
        make: dict[str, Any] = {
            "image2d": Record.from_image,
            "volume": Record.from_volume,
            "signal": Record.from_signal,
        }
        record: Record = make[job.kind](reading.array, **values)
        return record
    except ValueError as error:
        raise Unreadable(one_line(error), "look at the file's values in a viewer") from None
