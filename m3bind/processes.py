"""Processes that work for this one, and end with it."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait


def spawned_pool(
    workers: int,
    *,
    max_tasks_per_child: int | None = None,
    initializer: Callable[[], None] | None = None,
) -> ProcessPoolExecutor:
    """A pool of processes that end when this process does, however it does.

    Spawned, since the caller may hold threads (torch, DALI) that do not survive a fork.
    """
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=max_tasks_per_child,
        initializer=_start,
        initargs=(initializer,),
    )


def _start(initializer: Callable[[], None] | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer()


def _end_with_parent() -> None:
    """A pool's worker never learns that its parent was killed: it holds the queue open itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
