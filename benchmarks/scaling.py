"""Measures rates and steps of the losses over gloo ranks here, one thread each, and compares.

    python benchmarks/scaling.py [--quick]

W = 1, 2 and 4 ranks on this machine: with fewer cores than ranks, rates are those that all ranks
see at once. Writes benchmarks/results/scaling.json, which `m3bind results` renders into
docs/scaling.md; --quick writes build/scaling.json, at sizes that say nothing.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import run
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from scale_model import FEATURES, WORK
from scaling_page import RESULTS
from turns import unit_rows

from m3bind import ops
from m3bind.distributed import clip_loss, siglip_loss
from m3bind.distributed.agreement import Brought

ROOT = Path(__file__).parents[1]
SCALE = 30.0
ROWS = 1024  # of the batch whose matrix products are measured
LOSSES = {
    "clip_loss": lambda x, y, **how: clip_loss(x, y, SCALE, memory_budget=0, **how),
    "siglip_loss": lambda x, y, **how: siglip_loss(x, y, SCALE, -10.0, **how),
}


def shortest(call: Callable[[], Any], rounds: int) -> float:
    """The least of the seconds that the slowest rank took."""
    found = []
    for _ in range(rounds + 1):
        dist.barrier()
        begin = time.perf_counter()
        call()
        taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        found.append(taken.item())
    return min(found[1:])


def rates(dtype: str, rounds: int) -> dict[str, float]:
    """Of the operator's matrix products, by what twice the features cost it, and of a long and of a
    short message."""
    seconds = []
    for d in (FEATURES, 2 * FEATURES):
        x, y = (t.requires_grad_() for t in unit_rows(ROWS, 2, dtype, d=d))
        step = lambda x=x, y=y: ops.clip_loss(x, y, SCALE, memory_budget=0).backward()  # noqa: E731
        seconds.append(shortest(step, rounds))
    products = seconds[1] - seconds[0]
    W = dist.get_world_size()
    # A short one is what each call begins with.
    long, short = (torch.zeros(n, dtype=torch.uint8) for n in (1 << 22, 8 * len(fields(Brought))))
    seconds = []
    for sent in (long, short):
        found = sent.new_empty(W * sent.numel())
        seconds.append(shortest(lambda s=sent, f=found: dist.all_gather_into_tensor(f, s), rounds))
    return {
        "flops": 4 * 2 * ROWS * ROWS * FEATURES / products,
        "link": (W - 1) * long.numel() / seconds[0],
        "latency": seconds[1],
    }


def steps(dtype: str, loss: str, scheme: str, rows: int, rounds: int) -> float:
    x, y = (t.requires_grad_() for t in unit_rows(rows, 2, dtype, seed=dist.get_rank()))
    how = {"scheme": scheme} if dist.get_world_size() > 1 else {}

    def step() -> None:
        LOSSES[loss](x, y, **how).backward()

    return shortest(step, rounds)


def serve(rank: int, path: str, W: int, quick: bool, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=W,
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    rounds, batches = (2, (64, 128)) if quick else (7, (1024, 2048, 4096))
    found: dict[str, Any] = {"W": W, "rates": {}, "steps": []}
    for dtype in ("fp32", "bf16"):
        found["rates"][dtype] = rates(dtype, rounds)
        for loss, scheme in WORK:
            if (scheme == "one rank") != (W == 1):
                continue
            for B in (W, *batches):
                seconds = steps(dtype, loss, scheme, B // W, rounds)
                found["steps"].append(
                    {"loss": loss, "scheme": scheme, "dtype": dtype, "B": B, "seconds": seconds}
                )
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    runs = []
    for W in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/found.json"
            multiprocessing.spawn(serve, (f"{folder}/meet", W, quick, out), W)
            runs.append(json.loads(Path(out).read_text()))
    record = {
        "date": run.today(), "commit": run.commit(), **run.machine(), "features": FEATURES,
        "cores": len(os.sched_getaffinity(0)), "runs": runs,
    }  # fmt: skip
    path = ROOT / "build" / "scaling.json" if quick else RESULTS
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
