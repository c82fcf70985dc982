"""Writing the simulated cohort: patients in parallel processes, shards in order, one YAML last."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from PIL import Image

from m3bind.bars import progress_bar
from m3bind.data.constants import SPLITS
from m3bind.data.dataset import Dataset, ModalityInfo
from m3bind.data.phantom.canvas import Simulated
from m3bind.data.phantom.patients import Patient, make_patient
from m3bind.data.phantom.reports import plain_facts, write_report
from m3bind.data.phantom.table import table
from m3bind.data.records import Record
from m3bind.data.reports import compose
from m3bind.data.shard_writer import ShardWriter
from m3bind.data.shards import shard_paths, whole_samples
from m3bind.errors import M3BindError
from m3bind.processes import spawned_pool

NAME = "simulated"
_JPEG_QUALITY = 90
# The modules of m3bind.data, besides those of the phantom, that shape a shard's bytes.
_SHAPES_BYTES = ("constants", "dataset", "records", "reports", "shard_writer", "shards")
_CHUNK = 8  # patients that a process simulates at a time

_Job = tuple[str, str, int, int]  # the arguments of make_record


def simulate(patient: Patient) -> Simulated:
    """The examination of one patient, by the simulator of the patient's modality."""
    return import_module(f"m3bind.data.phantom.{patient.modality}").simulate(patient)


def make_record(modality: str, split: str, index: int, seed: int) -> Record:
    """The record of the index-th patient of a modality and split: a function of its arguments."""
    patient = make_patient(modality, split, index, seed)
    simulated = simulate(patient)
    findings, impression = write_report(patient, simulated)
    values: dict[str, Any] = {
        "id": f"simulated-{modality}-{patient.pseudonym}",
        "patient": patient.pseudonym,
        "modality": modality,
        "split": split,
        "labels": (patient.label,),
        "simulated": True,
        "report": compose(findings, impression),
        "source": {"simulator": "m3bind phantom", "seed": seed, "number": patient.number},
        "attributes": patient.attributes() | plain_facts(simulated.facts),
    }
    kind = table().modalities[modality].kind
    if kind == "volume":
        return Record.from_volume(simulated.array, spacing_mm=simulated.spacing_mm, **values)
    if kind == "signal":
        return Record.from_signal(simulated.array, **values)
    if simulated.array.ndim == 2:
        return Record.from_image(simulated.array, **values)
    buffer = io.BytesIO()
    Image.fromarray(simulated.array).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return Record(kind=kind, extension="jpg", payload=buffer.getvalue(), **values)


def fingerprint(seed: int, counts: dict[str, int], modalities: Sequence[str]) -> str:
    """Changes whenever the cohort would: seed, sizes, or the code that makes the bytes."""
    digest = hashlib.sha256(repr((seed, sorted(counts.items()), list(modalities))).encode())
    package = resources.files("m3bind.data")
    beside = [package / f"{name}.py" for name in _SHAPES_BYTES]
    for entry in sorted([*(package / "phantom").iterdir(), *beside], key=lambda e: e.name):
        if entry.name.endswith((".py", ".yaml")):
            digest.update(entry.name.encode() + entry.read_bytes())
    return digest.hexdigest()[:16]


def _finished(root: Path, key: str, counts: dict[str, int]) -> Dataset | None:
    """The cohort that lies in root already, if it is the one that is wanted, and whole."""
    if not (root / "dataset.yaml").is_file():
        return None
    dataset = Dataset.load(root)
    if not (dataset.simulated and dataset.extra.get("fingerprint") == key):
        return None
    for modality in dataset.modalities:
        for split in counts:
            try:
                held = sum(whole_samples(path) for path in shard_paths(root, modality, split))
            except M3BindError:
                return None
            if held != counts[split]:
                return None
    return dataset


def _make_room(root: Path) -> None:
    """Remove an older simulated cohort; anything else in the folder is somebody's, so refuse."""
    if not root.is_dir():
        return
    for entry in sorted(root.iterdir()):
        ours = (
            entry.name == "dataset.yaml"
            or entry.match(".dataset.yaml.*.part")
            or (entry.is_dir() and entry.name in table().modalities)
        )
        others = [entry] if not ours else []
        if entry.is_dir():
            others += [f for f in entry.rglob("*.tar") if not f.name.startswith(f"{NAME}-")]
        if others:
            raise M3BindError(
                f"{others[0]} is not part of a simulated cohort: choose another or an empty folder"
            )
    if (root / "dataset.yaml").is_file() and not Dataset.load(root).simulated:
        raise M3BindError(f"{root} holds real data: choose another folder for the simulated cohort")
    (root / "dataset.yaml").unlink(missing_ok=True)
    for modality in table().modalities:
        shutil.rmtree(root / modality, ignore_errors=True)


def make_cohort(
    root: str | Path,
    *,
    seed: int = 0,
    train: int = 1512,
    val: int = 210,
    test: int = 420,
    workers: int | None = None,
    modalities: Sequence[str] | None = None,
) -> Dataset:
    """Write the simulated cohort into `root`, unless it lies there already.

    `train`, `val` and `test` are patients a modality, balanced over its labels. The bytes depend
    on the arguments except `workers` (processes; None takes every core that this process may use).
    dataset.yaml is written last: without it a folder is no data set. An older simulated cohort in
    `root` is replaced; a folder with anything else in it raises M3BindError.
    """
    root = Path(root)
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"{split}={count}: each split needs at least one patient a modality")
    if workers is not None and workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} must be from 0 to {2**32 - 1}")
    known = table().modalities
    chosen = list(known) if modalities is None else list(modalities)
    unknown = [m for m in chosen if m not in known]
    if unknown or not chosen:
        raise ValueError(f"modalities={chosen}: choose among {', '.join(known)}")
    key = fingerprint(seed, counts, chosen)
    done = _finished(root, key, counts)
    if done is not None:
        return done
    _make_room(root)
    jobs = [
        (modality, split, i, seed)
        for modality in chosen
        for split, count in counts.items()
        for i in range(count)
    ]
    workers = workers or len(os.sched_getaffinity(0))
    records = _records(jobs, workers)
    with (
        closing(records),
        progress_bar(records, total=len(jobs), desc="simulated cohort", unit="patient") as bar,
    ):
        stream = iter(bar)
        for modality in chosen:
            bar.set_postfix_str(modality)
            for split, count in counts.items():
                with ShardWriter(root, NAME, modality, split) as writer:
                    for _ in range(count):
                        writer.write(next(stream))
    dataset = Dataset(
        root=root,
        name=NAME,
        simulated=True,
        labels=list(table().labels),
        modalities={
            m: ModalityInfo(
                kind=known[m].kind, labels=list(known[m].labels), prompts=known[m].prompts
            )
            for m in chosen
        },
        extra={
            "note": "simulated by m3bind phantom: it proves the machinery, not medicine",
            "seed": seed,
            "counts": counts,
            "fingerprint": key,
            "signs": {m: known[m].signs for m in chosen},
        },
    )
    dataset.write()
    return dataset


def _make_records(jobs: list[_Job]) -> list[Record]:
    return [make_record(*job) for job in jobs]


def _records(jobs: list[_Job], workers: int) -> Generator[Record, None, None]:
    """The records of all jobs, in order, with at most a few chunks of them ahead."""
    if workers == 1 or len(jobs) < 2 * _CHUNK:
        for job in jobs:
            yield make_record(*job)
        return
    left = deque(jobs[i : i + _CHUNK] for i in range(0, len(jobs), _CHUNK))
    ahead = deque[Future[list[Record]]]()
    pool = spawned_pool(workers, ignore_interrupt=True)
    try:
        while left or ahead:
            with _one_thread_each():
                while left and len(ahead) < 4 * workers:
                    ahead.append(pool.submit(_make_records, left.popleft()))
            yield from ahead.popleft().result()
    except BrokenProcessPool:
        raise M3BindError(
            f"one of {workers} processes that simulate patients was killed, mostly because memory "
            "ran out: free memory, or use fewer of them (m3bind phantom --workers), and do it again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that start inside use one numerical thread: there is a process a core."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(threads)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
