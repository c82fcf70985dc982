"""Which rank was lost: asked in the ranks' store once the transport has failed, which names none.

Each rank leaves its process in the store at its first call. After a failure each says there that it
lives, and looks for a few seconds who else does.
"""

from __future__ import annotations  # torch may be built without ProcessGroup

import contextlib
import os
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

SECONDS = 5.0  # the longest that naming may take
_PAUSE = 0.05
_announced: Any = None  # the store that knows this process


def announce() -> None:
    """Leaves this process in the store of the default group; costs nothing but the first time."""
    global _announced
    with contextlib.suppress(Exception):  # a store that fails is no reason to stop
        store = _store()
        if store is not _announced:
            _announced = store
            store.set(f"m3bind/process/{dist.get_rank()}", f"{os.getpid()} {_machine()}")


def naming_the_lost(
    error: Exception, group: dist.ProcessGroup | None = None, doing: str = "a step"
) -> RuntimeError:
    """The error to raise from what the transport raised; takes `SECONDS` at most.

    Every rank whose transport fails calls it. A rank that has not is named: as ended, where its
    process can be seen to have, else as one that does not answer.
    """
    said: list[str] = []
    # The store may not answer either, where it was on the machine that was lost.
    thread = threading.Thread(target=_look, args=(group, said), daemon=True)
    thread.start()
    thread.join(SECONDS + 1.0)
    who = said[0] if said else (
        f"the ranks' store does not answer, which rank 0 holds where no launcher does, so of ranks "
        f"{_ranks(group)} rank 0 may be the one"
    )  # fmt: skip
    return RuntimeError(
        f"m3bind: {doing} over several ranks lost one of them: {who}. The transport says: {error}"
    )


def _look(group: dist.ProcessGroup | None, said: list[str]) -> None:
    try:
        said.append(_who(_store(), _ranks(group)))
        if dist.get_rank() == 0:  # others may still read the store, which may end with this process
            time.sleep(10 * _PAUSE)
    except Exception:  # whatever a store raises that is gone
        return


def _who(store: Any, ranks: list[int]) -> str:
    own, end = dist.get_rank(), time.monotonic() + SECONDS
    store.set(f"m3bind/lives/{own}", "")
    silent, ended = [rank for rank in ranks if rank != own], set()
    while time.monotonic() < end:
        silent = [rank for rank in silent if not store.check([f"m3bind/lives/{rank}"])]
        ended |= {rank for rank in silent if _has_ended(store, rank)}
        if ended.issuperset(silent):
            break
        time.sleep(_PAUSE)
    if ended:
        return f"{_named(sorted(ended))} ended"
    if silent:
        return f"{_named(silent)} did not answer for {SECONDS:g} s: it ended, or did other things"
    return (
        "yet all of them answer: one did not call the same loss (and its backward) within the "
        "group's timeout"
    )


def _named(ranks: list[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in ranks)


def _has_ended(store: Any, rank: int) -> bool:
    """Whether it is known to: its process was on this machine, and is no more."""
    key = f"m3bind/process/{rank}"
    if not store.check([key]):
        return False
    process, _, machine = store.get(key).decode().partition(" ")
    if machine != _machine():
        return False
    try:
        os.kill(int(process), 0)
        with open(f"/proc/{process}/stat") as stat:  # nobody may have asked for its exit status
            return stat.read().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or a system without /proc
        return False


def _machine() -> str:
    """A machine, and the part of it in which numbers of processes mean the same."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _store() -> Any:
    """That of the default group; torch has no public way to it."""
    return getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()


def _ranks(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
