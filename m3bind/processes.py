"""Processes that work for this one, and end with it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def spawned_pool(workers: int, *, ignore_interrupt: bool = False) -> ProcessPoolExecutor:
    """A pool of processes that end when this process does, however it does.

    Spawned, since the caller may hold threads (torch, DALI) that do not survive a fork. With
    ``ignore_interrupt`` Ctrl-C, which the terminal sends to all of them, is left to the caller.
    """
    pool = _DeafPool if ignore_interrupt else ProcessPoolExecutor
    return pool(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
    )


class _DeafPool(ProcessPoolExecutor):
    # Processes start in submit, and inherit what is blocked: an initializer would come too late,
    # after seconds of imports.
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's worker never learns that its parent was killed: it holds the queue open itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
