"""Files that appear under their name only when they are whole, and folders of one process."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from m3bind.errors import M3BindError

if TYPE_CHECKING:
    from torch import Tensor

_HOST = socket.gethostname()
_LOCK = ".lock"
_WAIT = 10.0  # seconds, for a process that is about to end
_ours: set[tuple[int, Path]] = set()  # what a process has claimed


def partial_path(path: Path) -> Path:
    """Where this process writes ``path`` until it is whole: hidden, and in the same folder."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.part")


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
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path, wait: float | None = None) -> Iterator[None]:
    """No other process claims ``folder`` during the block; this one may, within it.

    The system gives it back, however this process ends (and those that it forked): over a network,
    where a machine is lost, when its lease ends. So this waits for it, ``wait`` seconds (10). Where
    a file system knows no locks, nobody is kept out.

    Raises M3BindError where another process has it, or where it cannot be written.
    """
    key = os.getpid(), folder.resolve()
    if key in _ours:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise unwritable(folder, error) from None
    with file:
        try:
            holder = None if _locked(file, _WAIT if wait is None else wait) else _holder(file)
        except OSError as error:
            raise unwritable(folder, error) from None
        if holder is not None:
            raise M3BindError(
                f"{folder} is in use by {holder}: let it end, or choose another output"
            )
        with suppress(OSError):  # the name is for others to read; a full disk has no room for it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {_HOST}".encode())
        _ours.add(key)
        try:
            yield
        finally:
            _ours.remove(key)


def _locked(file: IO[bytes], wait: float) -> bool:
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return True
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        else:
            return True


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode() or "another process"


def sync(path: Path) -> None:
    """What was written to a file, or which names a folder has, survives a power cut from now on."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically. Raises M3BindError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_write(path) as partial:
            save_file(dict(tensors), partial, metadata=dict(metadata))
    except (OSError, SafetensorError) as error:  # it wraps those of the system
        raise unwritable(path, error) from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` as JSON, atomically. Raises M3BindError where it cannot be written."""
    try:
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: object) -> M3BindError:
    """What to raise where ``path`` cannot be written."""
    return M3BindError(
        f"cannot write {path}: {error}: choose another folder, or see to its permissions and the "
        "space that is left"
    )


def _sweep(path: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote this file."""
    for partial in path.parent.glob(f".{escape(path.name)}.{escape(_HOST)}.*.part"):
        pid = partial.name.split(".")[-2]
        if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            partial.unlink(missing_ok=True)
