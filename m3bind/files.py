"""Files that appear under their name only when they are whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Where this process writes ``path`` until it is whole: hidden, and in the same folder."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces ``path`` when the block ends, and goes if that fails.

    Whatever happens, ``path`` is the old file or the whole new one, also after a power cut.
    Processes that write the same file at once do not disturb each other: the last one counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    partial = partial_path(path)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors makes files that nobody else may read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what processes left that were killed while they wrote this file."""
    for partial in path.parent.glob(f".{escape(path.name)}.*.part"):
        pid = partial.name.split(".")[-2]
        if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            partial.unlink(missing_ok=True)
