"""The processes that torchrun starts: all ranks of one training, or one process alone.

Every function here does nothing, or gives what one process alone would have, where no process
group was joined.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from m3bind.distributed.lost import announce, naming_the_lost
from m3bind.errors import M3BindError
from m3bind.files import claimed
from m3bind.parallel.joining import fresh_store

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of what one rank waits for another
PATIENCE = timedelta(days=7)  # where another computes what all need
LEASE = 120.0  # seconds: NFS gives back the locks of a machine that was lost after 90


@contextmanager
def started() -> Iterator[None]:
    """Join the ranks that torchrun started, for the length of the block.

    Equivalent to ``torch.distributed.init_process_group()`` with NCCL for what lies on a GPU and
    gloo for the rest, and ``destroy_process_group()`` once every rank is done. On a GPU each rank
    takes the one of its LOCAL_RANK. Without torchrun, nothing happens.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    shared, own, ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = fresh_store(shared, own, ranks, TIMEOUT)
    dist.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=TIMEOUT)
    if not is_first():
        logging.getLogger("m3bind").setLevel(logging.ERROR)  # the first rank says it for all
    with lost_ranks_named("a run"):
        yield
        dist.barrier()
    # Only after success: a rank that fails does not wait for others.
    dist.destroy_process_group()


def device() -> torch.device:
    """Where this rank computes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise M3BindError(
            f"LOCAL_RANK {local}, but this machine has {torch.cuda.device_count()} GPUs: start as "
            "many processes a machine as it has (--nproc-per-node)"
        )
    return torch.device("cuda", local)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank(group: Any = None) -> int:
    """This process in the group (default: of all)."""
    return dist.get_rank(group) if _joined() else 0


def size(group: Any = None) -> int:
    """The processes of the group (default: of all)."""
    return dist.get_world_size(group) if _joined() else 1


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def gathered_objects(own: Any, group: Any = None) -> list[Any]:
    """Every rank's object, in their order, on all of them. Small ones: they are pickled."""
    if size(group) == 1:
        return [own]
    found: list[Any] = [None] * size(group)
    dist.all_gather_object(found, own, group=group)
    return found


def by_first(work: Callable[[], T]) -> T:
    """What ``work`` returns on the first rank, on all of them.

    An M3BindError or OSError that it raises there is raised on all as M3BindError.
    """
    outcome: list[Any] = [None]
    if is_first():
        try:
            outcome = [(work(), None)]
        except (M3BindError, OSError) as error:
            outcome = [(None, str(error) or type(error).__name__)]
    if size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    ((found, failed),) = outcome
    if failed is not None:
        raise M3BindError(failed)
    return found


@contextmanager
def claimed_by_first(folder: Path) -> Iterator[None]:
    """`m3bind.files.claimed` by the first rank until all are through; what it raises, all do."""
    wait = LEASE if "TORCHELASTIC_RUN_ID" in os.environ else None
    with ExitStack() as ours:
        by_first(lambda: ours.enter_context(claimed(folder, wait)))
        yield
        meet()


def totals(*own: float, group: Any = None) -> list[float]:
    """The sum over the ranks of each number."""
    if size(group) == 1:
        return list(own)
    total = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.tolist()


def meet() -> None:
    """Wait for all ranks."""
    if size() > 1:
        dist.barrier()


def meet_after(work: str) -> None:
    """Wait for all ranks as long as it takes: some may have hours of ``work`` that others lack."""
    if size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    _turns[work] += 1
    key = f"m3bind/{work}/{_turns[work]}"
    if store.add(f"{key}/here", 1) == size():
        store.set(f"{key}/all", "here")
    store.wait([f"{key}/all"], PATIENCE)


@contextmanager
def lost_ranks_named(doing: str) -> Iterator[None]:
    """Turn what the transport says of a rank that is gone into one line that names it."""
    if size() == 1:
        yield
        return
    announce()
    try:
        yield
    except RuntimeError as error:
        named = error
        if not str(error).startswith("m3bind: "):
            # gloo raises plain errors, which only their text tells.
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            named = naming_the_lost(error, doing=doing)
        line = str(named).removeprefix("m3bind: ").partition(". The transport says")[0]
        raise M3BindError(
            f"{line}; torchrun goes on by itself with --max-restarts, or start again with --resume"
        ) from error


@contextmanager
def first_before_others(name: str, ranks: Sequence[int]) -> Iterator[None]:
    """The block, by the first of these ranks before the others: what it writes, they then find.

    ``name`` is of what the block does, the same on all of them. The others wait as long as it
    takes; torchrun ends them where the first one fails.
    """
    if len(ranks) < 2:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    _turns[name] += 1
    key = f"m3bind/{name}/{_turns[name]}"
    if rank() != ranks[0]:
        store.wait([key], PATIENCE)
    yield
    if rank() == ranks[0]:
        store.set(key, "done")


_turns: Counter[str] = Counter()


def launched() -> float:
    """When the first of the torchruns was started that started these ranks, in seconds since 1970;
    inf where none did.

    Restarts do not change it, nor do machines that come or go, of which torchrun keeps no count.
    """
    return min(gathered_objects(_start_of_agent()))


def _start_of_agent() -> float:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return math.inf
    import psutil

    for above in psutil.Process().parents():
        # A script may stand between it and this process, which is another after a restart.
        with suppress(psutil.AccessDenied):
            if "TORCHELASTIC_RUN_ID" in above.environ():
                continue
        return above.create_time()
    return math.inf
