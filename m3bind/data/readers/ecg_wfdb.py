"""Twelve-lead ECGs kept as WFDB records: a header (.hea) with .dat or .mat beside it."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3bind.data.readers.common import Reading, Unreadable, one_line
from m3bind.data.readers.ecg import add_lead, lead_of, microvolts, to_readings

PACKAGES = ("wfdb", "scipy")


def header(path: Path) -> Path:
    """The ``.hea`` of a record named by it, by its data file, or without any suffix."""
    if path.suffix == ".hea":
        return path
    if path.suffix in (".dat", ".mat"):
        return path.with_suffix(".hea")
    return path.with_name(path.name + ".hea")


def files(path: Path) -> list[Path]:
    """The header and the data files that it names."""
    head = header(path)
    lines = [line.split() for line in head.read_text(errors="replace").splitlines()]
    named = [words[0] for words in lines if words and not words[0].startswith("#")][1:]
    return [head, *dict.fromkeys(head.with_name(name) for name in named)]


def read(path: Path, part: str = "") -> list[Reading]:
    """The windows of the record, by the header's gain, baseline and unit.

    WFDB marks samples that are not valid as NaN. ``part`` is ``start:stop`` in seconds.
    """
    import wfdb

    absent = [file.name for file in files(path) if not file.is_file()]
    if absent:
        kind = Path(absent[0]).suffix or "data"
        raise Unreadable(
            f"a {kind} file that the record's header names is missing", "put it beside the header"
        )
    try:
        record = wfdb.rdrecord(str(header(path).with_suffix("")))
    except Exception as error:  # of many kinds for a bad header or a short file
        reason = f"it cannot be read as a WFDB record: {one_line(error)}"
        raise Unreadable(reason, "fetch the record's files again") from None
    steps = [f"{', '.join(sorted(set(record.units)))} to uV"]
    channels: dict[str, NDArray[np.float64]] = {}
    for index, (name, unit) in enumerate(zip(record.sig_name, record.units, strict=True)):
        lead = lead_of(name)
        if lead is not None:
            add_lead(channels, lead, record.p_signal[:, index] * microvolts(unit), steps)
    return to_readings(channels, float(record.fs), part, steps)
