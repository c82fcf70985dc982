"""Seconds and peak memory of each stage of a run, kept in its ``stages.json``.

A stage that is stopped and resumed counts with all its parts: while it runs, what it took so far
is written down every few seconds, so that not even a kill loses more than that.
"""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from m3bind.errors import Interrupted, M3BindError
from m3bind.files import atomic_write

SAMPLE_SECONDS = 0.2
WRITE_SECONDS = 5.0


class PeakMemory(threading.Thread):
    """Samples the resident memory of this process and its children, in MiB.

    Pages that processes share are counted once for each of them, so the figure is never too low
    by sharing; a peak shorter than the sampling interval can be missed. ``tick`` is called every
    `WRITE_SECONDS` with the peak so far.
    """

    def __init__(self, tick: Callable[[float], None]) -> None:
        super().__init__(daemon=True)
        self.peak_mib, self.tick = 0.0, tick
        self._ended = threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        due = time.monotonic() + WRITE_SECONDS
        while not self._ended.is_set():
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_mib = max(self.peak_mib, total / 2**20)
            if time.monotonic() >= due:
                with suppress(OSError):  # what was measured last is written by the block's end
                    self.tick(self.peak_mib)
                due = time.monotonic() + WRITE_SECONDS
            self._ended.wait(SAMPLE_SECONDS)

    def stop(self) -> float:
        self._ended.set()
        self.join()
        return self.peak_mib


def read_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured of the stages that ended: stage -> {"seconds", "peak_rss_mib"}."""
    names = ("seconds", "peak_rss_mib")
    return {
        s: {n: e[n] for n in names} for s, e in _entries(folder).items() if e.get("ended", True)
    }


@contextmanager
def measured(folder: Path, stage: str, *, resume: bool = False) -> Iterator[None]:
    """Measure the block and write it down under the stage's name.

    ``resume`` adds to what its earlier parts took; the peak is the highest of all parts. A block
    that raises counts as a part of a stage that has not ended: only what `Interrupted` stopped, or
    what ran for some seconds, as a mistake that is found at once is none. Raises at once, before
    any work is done, where the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    entries = _entries(folder)
    earlier = entries.get(stage, {}) if resume else {}
    start = time.perf_counter() - earlier.get("seconds", 0.0)
    peak = earlier.get("peak_rss_mib", 0.0)

    def write(peak_mib: float, ended: bool = False) -> None:
        entry = {
            "seconds": round(time.perf_counter() - start, 2),
            "peak_rss_mib": round(max(peak, peak_mib), 1),
            "ended": ended,
        }
        _write(folder, stage, entry)

    memory = PeakMemory(write)
    memory.start()
    try:
        yield
    except BaseException as error:
        reached = memory.stop()
        if isinstance(error, Interrupted):
            write(reached)
        raise
    write(memory.stop(), ended=True)


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "stages.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        for entry in found.values():
            float(entry["seconds"]), float(entry["peak_rss_mib"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{path} is damaged ({error!r}): remove it, only times are lost"
        raise M3BindError(reason) from None
    return found


def _write(folder: Path, stage: str, entry: dict[str, Any]) -> None:
    with (folder / ".stages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # stages of one run may end in several processes at once
        stages = {**_entries(folder), stage: entry}
        with atomic_write(folder / "stages.json") as partial:
            partial.write_text(json.dumps(stages, indent=2) + "\n")
