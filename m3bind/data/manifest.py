"""The manifest: a table of files, whose they are, and what is said of them.

CSV with a heading line, or JSON lines with the same names (labels as a list). The columns:

- ``path``: the file (CT also: the folder of a series), relative to the manifest's folder;
- ``modality``: xray, ct, retina, ecg, pathology, or one that the description gives a kind;
- ``patient``: any name for the patient; shards hold a salted hash of it;
- ``split``: train, val or test; all samples of a patient must be in the same;
- ``report``, or ``findings`` and ``impression``: the text; a report may use these headings;
- ``labels`` (may be left out, or empty): conditions, separated by ``;``;
- ``part`` (may be left out, or empty): which part of the file to take, as start:stop ranges in
  whole numbers. Images: ``rows,columns`` in pixels. Slides: ``rows,columns`` in pixels of the
  finest level, within which tiles are taken. CT: ``depth,rows,columns`` in voxels, cranial
  first; ``0:1`` makes a single slice file a volume. ECG: ``start:stop`` in seconds.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3bind.data.constants import SPLITS
from m3bind.data.reports import compose, sections
from m3bind.errors import M3BindError

REQUIRED = ("path", "modality", "patient", "split")
TEXT = ("report", "findings", "impression")
OPTIONAL = ("labels", "part")
COLUMNS = (*REQUIRED, *TEXT, *OPTIONAL)


@dataclass(kw_only=True, slots=True)
class Entry:
    """One line of the manifest; ``problem`` is (reason, remedy) where it cannot be used."""

    line: int
    path: str = ""
    modality: str = ""
    patient: str = ""
    split: str = ""
    report: str = ""
    labels: tuple[str, ...] = ()
    part: str = ""
    problem: tuple[str, str] | None = None


def read_manifest(path: Path, modalities: Iterable[str]) -> list[Entry]:
    """The manifest's lines, in order. ``modalities`` are the names whose kind is known.

    Raises M3BindError, before anything else is done, for a manifest that cannot be read, has
    unknown or missing columns, or puts a patient into two splits (which would let a model be
    tested on those it was trained on).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise M3BindError(f"{path}: there is no such manifest") from None
    except (OSError, UnicodeDecodeError) as error:
        raise M3BindError(f"{path}: the manifest must be text in UTF-8: {error}") from None
    is_json = path.suffix.lower() in (".jsonl", ".ndjson") or text.lstrip().startswith("{")
    lines = _from_json(path, text) if is_json else _from_csv(path, text)
    if not lines:
        raise M3BindError(f"{path}: the manifest lists no file")
    known = tuple(modalities)
    entries = [
        Entry(line=number, problem=values)
        if isinstance(values, tuple)
        else _entry(number, values, known)
        for number, values in lines
    ]
    _refuse_leak(path, entries)
    return entries


_Line = tuple[int, dict[str, Any] | tuple[str, str]]


def _from_csv(path: Path, text: str) -> list[_Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: list[_Line] = []
    try:
        heading = [name.strip() for name in next(reader, [])]
        _check_columns(path, heading)
        last = reader.line_num
        for cells in reader:
            number, last = last + 1, reader.line_num  # a quoted report may run over lines
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(heading):
                reason = f"the line has {len(cells)} cells under {len(heading)} columns"
                found.append((number, (reason, "put text that holds commas in quotes")))
            else:
                found.append((number, dict(zip(heading, cells, strict=True))))
    except csv.Error as error:
        raise M3BindError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    return found


def _from_json(path: Path, text: str) -> list[_Line]:
    found: list[_Line] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            found.append((number, (f"the line is not JSON: {error}", "correct the manifest")))
            continue
        if not isinstance(values, dict):
            found.append((number, ("the line is not a JSON object", "correct the manifest")))
            continue
        _check_columns(path, list(values), f", line {number}")
        found.append((number, values))
    return found


def _check_columns(path: Path, names: list[str], where: str = "") -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise M3BindError(f"{path}{where}: the column {twice[0]!r} stands there twice")
    unknown = [name for name in names if name not in COLUMNS]
    missing = [name for name in REQUIRED if name not in names]
    if not set(names) & set(TEXT):
        missing.append("report")
    if unknown:
        close = difflib.get_close_matches(unknown[0], COLUMNS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise M3BindError(
            f"{path}{where}: unknown column {unknown[0]!r}{hint}; known: {', '.join(COLUMNS)}"
        )
    if missing:
        raise M3BindError(f"{path}{where}: the column {', '.join(map(repr, missing))} is missing")
    if "report" in names and {"findings", "impression"} & set(names):
        raise M3BindError(f"{path}{where}: give report, or findings and impression, not both")


def _entry(line: int, values: Mapping[str, Any], modalities: tuple[str, ...]) -> Entry:
    cells = {name: _text(values.get(name)) for name in COLUMNS if name != "labels"}
    labels = values.get("labels") or ""
    names = labels if isinstance(labels, list) else str(labels).split(";")
    report = cells["report"] or compose(cells["findings"], cells["impression"])
    entry = Entry(
        line=line,
        path=cells["path"],
        modality=cells["modality"],
        patient=cells["patient"],
        split=cells["split"],
        report=report,
        labels=tuple(dict.fromkeys(name for name in map(_text, names) if name)),
        part=cells["part"],
    )
    for name in REQUIRED:
        if not cells[name]:
            entry.problem = (f"the column {name} is empty", "fill it in the manifest")
            return entry
    if entry.modality not in modalities:
        close = difflib.get_close_matches(entry.modality, modalities, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        entry.problem = (
            f"unknown modality {entry.modality!r}{hint}",
            f"use one of {', '.join(modalities)}, or give it a kind in the description",
        )
    elif entry.split not in SPLITS:
        entry.problem = (f"unknown split {entry.split!r}", f"use one of {', '.join(SPLITS)}")
    elif not sections(report).whole:
        entry.problem = ("the report is empty", "write one, or leave the file out")
    return entry


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _refuse_leak(path: Path, entries: list[Entry]) -> None:
    splits: dict[str, set[str]] = {}
    for entry in entries:
        if entry.patient and entry.split:
            splits.setdefault(entry.patient, set()).add(entry.split)
    leaks = [patient for patient, found in splits.items() if len(found) > 1]
    if leaks:
        named = ", ".join(f"{p} ({' and '.join(sorted(splits[p]))})" for p in leaks[:5])
        more = f" and {len(leaks) - 5} more" if len(leaks) > 5 else ""
        raise M3BindError(
            f"{path}: patients in two splits: {named}{more}: put all samples of a patient into one"
        )
