"""The errors that a user can mend; the command line prints them as one line."""


class M3BindError(Exception):
    """What went wrong, the value that is wrong, and the remedy, in one message."""


class Interrupted(M3BindError):
    """Training was stopped from outside after it wrote a checkpoint."""
