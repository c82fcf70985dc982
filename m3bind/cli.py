"""The ``m3bind`` program: starts a command, and turns errors into one line and an exit code.

``m3bind info`` and ``m3bind results`` need torch alone; every other command needs the extra
``train``.
"""

import errno
import os
import sys

from m3bind.errors import EXIT_ERROR, EXIT_INTERRUPTED, Interrupted, M3BindError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Run one command; exits 0, 1 (an error), 2 (wrong usage), 3 (some files were rejected) or 130
    (stopped)."""
    if sys.argv[1:] == ["info"]:
        from m3bind.info import describe

        print(describe())
        return
    try:
        if sys.argv[1:] == ["results"]:
            from m3bind.results import render

            render()
            return
        from m3bind.commands import app

        app()
    except ModuleNotFoundError as error:  # also of what a command imports only when it needs it
        if os.environ.get("M3BIND_DEBUG") or (error.name or "m3bind").startswith("m3bind"):
            raise
        sys.exit(
            f"m3bind: {error.name} is not installed; this command needs the extra 'train': "
            "pip install 'm3bind[train]'   (m3bind info works without it)"
        )
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # all ranks were stopped alike
            print(f"m3bind: {stop}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (M3BindError, ValueError) as error:
        if os.environ.get("M3BIND_DEBUG"):
            raise
        print(f"{_name()}: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except (OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("M3BIND_DEBUG") or not (line := _one_line(error)):
            raise
        print(f"{_name()}: {line}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print("m3bind: stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _name() -> str:
    """Who speaks: of several ranks, which."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return f"m3bind: rank {os.environ.get('RANK')}" if several else "m3bind"


def _one_line(error: OSError | MemoryError | RuntimeError) -> str | None:
    """What the machine lacks or refuses, with the remedy; None for what is a fault of ours."""
    if isinstance(error, OSError):
        if error.filename is None and error.errno not in _NO_SPACE:
            return None
        return (
            f"{error.filename or 'a file that was being written'}: {error.strerror}; choose "
            "another path, or see to its permissions and the space that is left"
        )
    # torch says so in a subclass of RuntimeError for a GPU, and in words alone for the CPU.
    named = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or named:
        return (
            f"not enough memory ({' '.join(str(error).split())[:200] or 'MemoryError'}): lower "
            "the batch size, width or image size, or close other programs"
        )
    return None
