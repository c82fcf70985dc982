"""Calls in which some ranks bring what does not fit, and what each of them is told."""

from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
import torch.distributed as dist
from cases import unit

from m3bind import distributed


def caught(changes: dict[int, dict[str, Any]], given: dict[str, Any] | None = None) -> str | None:
    """The error of a call in which some ranks bring something else."""
    own = {"rows": 4, "features": 8, "dtype": torch.float32} | changes.get(dist.get_rank(), {})
    rows, dtype = own.pop("rows"), own.pop("dtype")
    x, y = (unit(rows, own["features"], seed).to(dtype) for seed in (0, 1))
    del own["features"]
    if own.pop("nan", False):
        x[1, 2] = torch.nan
    grad = own.pop("grad", True)
    if own.pop("short", False):
        y = y[:-1]
    within, loss = own.pop("within", None), getattr(distributed, own.pop("loss", "clip_loss"))
    step = partial(loss, y=y, logit_scale=own.pop("scale", 5.0), **((given or {}) | own))
    try:
        with torch.set_grad_enabled(grad):
            if within == "torch.func":
                torch.func.grad(step)(x)
            elif within == "forward mode":
                with fwd.dual_level():
                    step(fwd.make_dual(x, x))
            elif within == "inference mode":
                with torch.inference_mode():
                    x = x.clone()
                step(x)
            else:
                step(x.requires_grad_(grad))
    except ValueError as error:
        return str(error)
    return None


def caught_sharded(wrong: dict[int, str], op: str) -> str:
    """The error of a call with DTensors, which some ranks bring otherwise."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, y = (unit(4, 8, dist.get_rank() + seed) for seed in (0, 9))
    how = wrong.get(dist.get_rank(), "")
    placed = [Replicate() if how == "replicated" else Shard(0)]
    given = [DTensor.from_local(t, mesh, placed, run_check=False) for t in (x, y)]
    if "plain" in how:
        given[1] = y
    if how == "all plain":
        given[0] = x
    scale: Any = torch.tensor(5.0)
    if how == "scale":
        scale = DTensor.from_local(scale, mesh, [Replicate()], run_check=False)
    teacher, ids = [*given, 9.0] if op == "similarity_distill" else [], {}
    if how == "ids":
        own = DTensor.from_local(torch.arange(4), mesh, placed, run_check=False)
        names = ("row_ids", "col_ids") if op == "similarity_lse" else ("mask_ids",)
        ids = dict.fromkeys(names, own)
    try:
        getattr(distributed, op)(*given, scale, *teacher, **ids)
    except ValueError as error:
        return str(error)
    return ""
