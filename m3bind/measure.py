"""Seconds and peak memory of each stage of a run, kept in its ``stages.json``."""

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3bind.files import atomic_write

SAMPLE_SECONDS = 0.2


class PeakMemory(threading.Thread):
    """Samples the resident memory of this process and its children, in MiB.

    Pages that processes share are counted once for each of them, so the figure is never too low
    by sharing; a peak shorter than the sampling interval can be missed.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._ended.is_set():
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_mib = max(self.peak_mib, total / 2**20)
            self._ended.wait(SAMPLE_SECONDS)

    def stop(self) -> float:
        self._ended.set()
        self.join()
        return self.peak_mib


def read_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured so far: stage -> {"seconds", "peak_rss_mib"}."""
    path = folder / "stages.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@contextmanager
def measured(folder: Path, stage: str) -> Iterator[None]:
    """Measure the block and write it down, if it ends well, under the stage's name."""
    memory = PeakMemory()
    memory.start()
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        memory.stop()
        raise
    seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".stages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # stages of one run may end in several processes at once
        stages = read_stages(folder)
        stages[stage] = {"seconds": round(seconds, 2), "peak_rss_mib": round(memory.stop(), 1)}
        with atomic_write(folder / "stages.json") as partial:
            partial.write_text(json.dumps(stages, indent=2) + "\n")
