"""The ``m3bind`` program: starts a command, and turns errors into one line and an exit code.

``m3bind info`` needs torch alone; every other command needs the extra ``train``.
"""

import os
import sys

from m3bind.errors import EXIT_ERROR, EXIT_INTERRUPTED, Interrupted, M3BindError


def main() -> None:
    """Run one command; exits 0, 1 (an error), 3 (some files were rejected) or 130 (stopped)."""
    if sys.argv[1:] == ["info"]:
        from m3bind.info import describe

        print(describe())
        return
    try:
        from m3bind.commands import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"m3bind: {error.name} is not installed; this command needs the extra 'train': "
            "pip install 'm3bind[train]'   (m3bind info works without it)"
        )
    try:
        app()
    except Interrupted as stop:
        print(f"m3bind: {stop}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (M3BindError, ValueError) as error:
        if os.environ.get("M3BIND_DEBUG"):
            raise
        print(f"m3bind: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except OSError as error:
        if os.environ.get("M3BIND_DEBUG") or error.filename is None:
            raise
        print(
            f"m3bind: {error.filename}: {error.strerror}; choose another path, or see to its "
            "permissions and the space that is left",
            file=sys.stderr,
        )
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print("m3bind: stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
