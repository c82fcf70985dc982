"""How ranks find each other, also after torchrun started them anew."""

import hashlib
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.05


def fresh_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The part of ``store`` that the ranks which are here now, and no others, share.

    torchrun may keep one store over its restarts, and in it the addresses of ranks that are gone
    (pytorch issues 135712 and 167288), while its count of restarts differs between machines. So
    each rank leaves a new name, the first one lists them, and a list counts once all on it agree.
    Raises TimeoutError where they do not in ``timeout``.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    here = [f"m3bind/here/{other}" for other in range(size)]
    store.set(here[rank], name)
    listed = agreed = ""
    while time.monotonic() < end:
        if rank == 0 and store.check(here):
            names = ",".join(one.decode() for one in store.multi_get(here))
            latest = hashlib.sha256(names.encode()).hexdigest()[:32]
            if latest != listed:
                store.set(f"m3bind/names/{latest}", names)
                store.set("m3bind/list", latest)
                listed = latest
        found = store.get("m3bind/list").decode() if store.check(["m3bind/list"]) else ""
        if found and found != agreed:
            names = store.get(f"m3bind/names/{found}").decode()
            if names.split(",")[rank : rank + 1] == [name]:
                agreed = found
                store.add(f"m3bind/agreed/{agreed}", 1)
        if agreed and store.add(f"m3bind/agreed/{agreed}", 0) == size:
            return dist.PrefixStore(f"m3bind/{agreed}", store)
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"rank {rank}: not all of {size} ranks arrived within {timeout}")
