"""Ctrl-C and SIGTERM ask a training to end; it ends after its step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    requested = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Note SIGINT and SIGTERM instead of dying; a second SIGINT is Python's as before.

    A second SIGTERM is not: a scheduler sends one to every process, and torchrun passes its own on.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in numbers:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, before[number])
