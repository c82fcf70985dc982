"""The errors that a user can mend: the command line prints one line, and exits with a code."""

EXIT_ERROR, EXIT_REJECTS, EXIT_INTERRUPTED = 1, 3, 130


class M3BindError(Exception):
    """What went wrong, the value that is wrong, and the remedy, in one message."""


class Interrupted(M3BindError):
    """Training was stopped from outside after it wrote a checkpoint."""
