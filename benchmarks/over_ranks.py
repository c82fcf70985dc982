"""The symmetric loss of a batch over two gloo ranks, one thread each; prints JSON.

    python benchmarks/over_ranks.py turns DTYPE B SECONDS     all contestants, in turns
    python benchmarks/over_ranks.py cold DTYPE B NAME         one call in fresh processes

B rows a rank. A round is as long as its slowest rank. bytes: what a rank sends, by the collectives'
formulas, an all-gather of t bytes counting t * (W - 1). extra_mib: the peak beyond what is there
before the call, and beyond the gradients that it returns, of the rank that needs most.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from cold import MIB, settle, status
from torch import Tensor
from turns import DTYPES, LEAST_ROUNDS, MOST_ROUNDS, step, unit_rows

from m3bind import losses

WORLD = 2
SCALE = 100.0


def open_clip(rank: int) -> Callable[..., Tensor]:
    from open_clip.loss import ClipLoss

    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=WORLD)


def m3bind(rank: int, scheme: str = "auto") -> Callable[..., Tensor]:
    return losses.ClipLoss(rank=rank, world_size=WORLD, scheme=scheme)


CONTESTANTS: dict[str, tuple[Callable[[int], Callable[..., Tensor]], str]] = {
    "m3bind": (m3bind, 'scheme "auto"'),
    "m3bind gather": (partial(m3bind, scheme="gather"), 'scheme "gather"'),
    "open_clip": (open_clip, "local_loss, gather_with_grad"),
}


def contestant(name: str, dtype: str, rows: int, rank: int) -> Callable[[], Any]:
    loss = CONTESTANTS[name][0](rank)
    x, y = unit_rows(rows, 2, dtype, seed=rank)
    if dtype != "fp32" and name == "open_clip":
        inner = loss

        def loss(x, y, scale):
            with torch.autocast("cpu", DTYPES[dtype]):
                return inner(x, y, scale)

    return step(loss, (x, y, torch.tensor(SCALE)))


def sent(run: Callable[[], Any]) -> int:
    """Bytes that this rank sends in one run."""
    found: Counter[str] = Counter()

    def counting(name: str, count: Callable[..., int]) -> Any:
        plain = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += count(*args, **kwargs)
            return plain(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    def swapped(out: Tensor, own: Tensor, outs: list, ins: list, **_: Any) -> int:
        return own.nbytes // max(1, own.shape[0]) * (sum(ins) - ins[dist.get_rank()])

    def scattered(out: Tensor, own: list | None = None, src: int = 0, **_: Any) -> int:
        return sum(t.nbytes for t in own[1:]) if own and src == dist.get_rank() else 0

    def passed(operations: list) -> int:
        return sum(o.tensor.nbytes for o in operations if o.op is dist.isend)

    with (
        counting("all_gather_into_tensor", lambda out, own, **_: (WORLD - 1) * own.nbytes),
        counting("all_gather", lambda out, own, **_: (WORLD - 1) * own.nbytes),
        counting("all_to_all_single", swapped),
        counting("scatter", scattered),
        counting("batch_isend_irecv", passed),
    ):
        run()
    return sum(found.values())


def turns(rank: int, dtype: str, rows: int, seconds: float) -> dict[str, Any]:
    runs = {name: contestant(name, dtype, rows, rank) for name in CONTESTANTS}
    found = {name: {"bytes": sent(run), "seconds": []} for name, run in runs.items()}
    start, rounds, going = time.perf_counter(), 0, torch.ones(1)
    while going:
        names = [*runs]
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            dist.barrier()
            begin = time.perf_counter()
            runs[name]()
            taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            found[name]["seconds"].append(taken.item())
        rounds += 1
        going[0] = rounds < LEAST_ROUNDS or (
            time.perf_counter() - start < seconds and rounds < MOST_ROUNDS
        )
        dist.broadcast(going, 0)
    return found


def cold(rank: int, dtype: str, rows: int, name: str) -> dict[str, Any]:
    contestant(name, dtype, 8, rank)()  # libraries that load late, connections
    run = contestant(name, dtype, rows, rank)
    dist.barrier()
    settle()
    before = status("VmRSS")
    begin = time.perf_counter()
    gradients = sum(g.nbytes for g in run())
    seconds = time.perf_counter() - begin
    extra = torch.tensor((status("VmHWM") - before - gradients) / MIB, dtype=torch.float64)
    dist.all_reduce(extra, dist.ReduceOp.MAX)
    return {name: {"seconds": [seconds], "extra_mib": extra.item()}}


def serve(rank: int, path: str, kind: str, dtype: str, rows: int, last: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    found = turns(rank, dtype, rows, float(last)) if kind == "turns" else cold(
        rank, dtype, rows, last
    )  # fmt: skip
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    kind, dtype, rows, last = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(serve, (f"{folder}/meet", kind, dtype, int(rows), last), WORLD)
