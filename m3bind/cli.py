"""The ``m3bind`` program: starts a command, and turns errors into one line and an exit code.

``m3bind info`` needs torch alone; every other command needs the extra ``train``.
"""

import os
import sys

from m3bind.errors import Interrupted, M3BindError

EXIT_ERROR, EXIT_REJECTS, EXIT_INTERRUPTED = 1, 3, 130


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
    except KeyboardInterrupt:
        print("m3bind: stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
