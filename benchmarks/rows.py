"""The row that a contestant gets: into pytest-benchmark's own report, and into a file.

The file (M3BIND_BENCH_ROWS, one JSON object a line) is added to row by row, so a run that dies
keeps what it found.
"""

import json
import os
import statistics
from typing import Any

import pytest
from turns import DEVICE, DTYPES, THREADS, Taken

from m3bind import backends

_clock = 0.0


def replayed() -> float:
    """The timer of every benchmark here: pytest-benchmark sees the rounds taken in turns."""
    return _clock


def backend_of(contestant: str, facts: dict[str, Any]) -> str | None:
    """Whose kernels a contestant runs; None for a peer."""
    if facts.get("op") not in backends.BUILT_ON:
        return None
    if contestant == "m3bind chunked":
        return "chunked"
    if contestant.startswith("m3bind") or contestant.endswith((" thread", " threads")):
        if contestant.startswith("floor"):
            return None
        return backends.resolve(facts["op"], DEVICE, DTYPES[facts["dtype"]])
    return None


def report(benchmark: Any, group: str, name: str, taken: Taken, **facts: Any) -> None:
    """Facts say what was measured: op, kind, dtype, n; and may say what else was found."""
    row = {
        "group": group, "contestant": name, "setting": taken.setting, "threads": THREADS, **facts,
    }  # fmt: skip
    backend = backend_of(name, facts)
    if backend is not None:
        primitive = backends.BUILT_ON[facts["op"]]
        row |= {"backend": backend, "sources": backends.installed_sources(primitive, backend)}
    if taken.problem:
        row["problem"] = taken.problem
    else:
        row["min_ms"] = 1e3 * min(taken.seconds)
        row["median_ms"] = 1e3 * statistics.median(taken.seconds)
        row["rounds"] = len(taken.seconds)
    if path := os.environ.get("M3BIND_BENCH_ROWS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if taken.problem.startswith("not run"):
        pytest.skip(f"{name}: {taken.problem}")
    if taken.problem:
        pytest.fail(f"{name}: {taken.problem}", pytrace=False)
    benchmark.group = group
    benchmark.extra_info.update(row)
    rounds = iter(taken.seconds)

    def replay() -> None:
        global _clock
        _clock += next(rounds)

    benchmark.pedantic(replay, rounds=len(taken.seconds))
