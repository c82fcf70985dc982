"""Files appear whole or not at all, whoever is killed or fails."""

import contextlib
import errno
import fcntl
import resource
import stat
import subprocess
import sys

import pytest
import torch
from holder import held

from m3bind import files
from m3bind.errors import M3BindError
from m3bind.files import atomic_write, claimed, write_tensors


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    with atomic_write(path) as partial:
        partial.write_text("old")
        assert not path.exists() and partial.parent == path.parent
    with pytest.raises(RuntimeError), atomic_write(path) as partial:
        partial.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_others_may_read_it_as_the_umask_says(tmp_path):
    """safetensors writes files that only their owner may read."""
    with atomic_write(tmp_path / "x") as partial:
        partial.unlink()
        partial.write_bytes(b"x")
        partial.chmod(0o600)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    killed = (
        "import os, pathlib, sys\n"
        "from m3bind.files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as partial: os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "x")], check=False)
    (left,) = tmp_path.iterdir()
    living = tmp_path / ".x.1.part"  # of a process that still writes
    living.touch()
    with atomic_write(tmp_path / "x") as partial:
        partial.write_text("whole")
    assert not left.exists() and living.exists() and (tmp_path / "x").read_text() == "whole"


@contextlib.contextmanager
def no_space(room=64):
    """No file may grow beyond a few bytes: as on a full disk, but for this process alone. Not a
    fixture, which would end after pytest has told the outcome, perhaps into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensors_that_find_no_space_leave_the_old_file_and_say_so(tmp_path):
    path = tmp_path / "last.safetensors"
    path.write_text("old")
    wanted = pytest.raises(M3BindError, match=r"cannot write .*last\.safetensors: .*the space")
    with wanted, no_space():
        write_tensors(path, {"x": torch.zeros(100)}, {})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


TAKER = (
    "import pathlib, sys\n"
    "from m3bind import files\n"
    "from m3bind.errors import M3BindError\n"
    "files._WAIT = 0.1\n"
    "try:\n"
    "    with files.claimed(pathlib.Path(sys.argv[1])): pass\n"
    "except M3BindError: sys.exit(1)\n"
)


def test_a_folder_has_one_process_until_that_ends_however_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WAIT", 0.3)
    folder = tmp_path / "not" / "there"
    with held(folder) as process:
        with pytest.raises(M3BindError) as error, claimed(folder):
            pass
        assert f"{folder} is in use by process {process.pid} on " in str(error.value)
        assert "\n" not in str(error.value)
        with claimed(tmp_path):  # the folder alone, not what is above it
            pass
    for _ in range(2):
        with claimed(folder), claimed(folder):
            pass
        # Neither the second claim nor somebody who reads the folder gave it back.
        with claimed(folder), claimed(folder / ".." / folder.name):
            (folder / ".lock").read_text()
            taken = subprocess.run([sys.executable, "-c", TAKER, str(folder)], check=False)
            assert taken.returncode == 1
    with pytest.raises(ZeroDivisionError), claimed(folder):
        raise ZeroDivisionError
    assert subprocess.run([sys.executable, "-c", TAKER, str(folder)], check=False).returncode == 0


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path):
    with held(tmp_path, seconds=0.5) as process, claimed(tmp_path):
        assert process.wait(5) == 0


def test_where_no_locks_are_known_nobody_is_kept_out(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with claimed(tmp_path):
        pass


def test_a_lock_that_fails_is_told(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(M3BindError, match=r"cannot write .*Input/output error"), claimed(tmp_path):
        pass


def test_the_name_of_the_holder_needs_no_room(tmp_path):
    with claimed(tmp_path):
        pass
    with no_space(room=0), claimed(tmp_path):
        pass


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(M3BindError, match=r"file/out"), claimed(tmp_path / "file" / "out"):
        pass
