"""Another process that has claimed a folder."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLDER = (
    "import pathlib, sys, time\n"
    "from m3bind.files import claimed\n"
    "with claimed(pathlib.Path(sys.argv[1])): print('mine', flush=True); time.sleep({})\n"
)


@contextmanager
def held(folder: Path, seconds: float = 60) -> Iterator[subprocess.Popen]:
    """It has the folder when the block begins, and is killed at its end."""
    command = [sys.executable, "-c", HOLDER.format(seconds), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        try:
            yield process
        finally:
            process.kill()
