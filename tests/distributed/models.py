"""Programs that tests run in each rank: encoders, groups, and calls that go wrong."""

import os
import signal
import time
from collections import Counter
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cases import unit
from torch import Tensor, nn

from m3bind import distributed, losses, ops

WIDTH = 6


class Encoder(nn.Module):
    """Two towers, a scale and a bias, in one module, as CLIP has them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width))
        self.right = nn.Linear(width, width)
        # FSDP2 refuses a parameter without dimensions.
        self.log_scale = nn.Parameter(torch.tensor([1.5]))
        self.bias = nn.Parameter(torch.tensor([-1.0]))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        x, y = (nn.functional.normalize(t, dim=1) for t in (self.left(a), self.right(b)))
        return x, y, self.log_scale.exp(), self.bias * 1.0


def loss_of(name: str, over: Any, found: tuple[Tensor, ...], teacher: tuple, **how: Any) -> Tensor:
    x, y, scale, bias = found
    if name == "siglip_loss":
        return over.siglip_loss(x, y, scale, bias, **how)
    if name == "similarity_distill":
        # DDP wants every parameter in the loss.
        return over.similarity_distill(x, y, scale, *teacher, 9.0, **how) + 0 * bias.sum()
    return over.clip_loss(x, y, scale, logit_bias=bias, z_loss=1e-2, **how)


def batches(counts: list[int], steps: int) -> list[tuple[Tensor, ...]]:
    """For each step a, b and the teacher's features of the whole batch."""
    n = sum(counts)
    return [tuple(unit(n, WIDTH, 10 * step + i) for i in range(4)) for step in range(steps)]


def train(wrap: str, name: str, counts: list[int], steps: int, scheme: str) -> dict[str, Tensor]:
    """Gradients after `steps` micro-batches, as DDP or FSDP2 leave them."""
    model: Any = Encoder()
    if wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for part in (model.left, model.right):
            fully_shard(part)
        fully_shard(model)
    for a, b, *teacher in batches(counts, steps):
        a, b, *teacher = (t.split(counts)[dist.get_rank()] for t in (a, b, *teacher))
        loss_of(name, distributed, model(a, b), teacher, scheme=scheme).backward()
    grads = {}
    for key, parameter in model.named_parameters():
        grad = parameter.grad
        grads[key.removeprefix("module.")] = (
            grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        )
    return grads


def train_alone(name: str, counts: list[int], steps: int) -> dict[str, Tensor]:
    model = Encoder().double()
    for batch in batches(counts, steps):
        a, b, *teacher = (t.double() for t in batch)
        loss_of(name, ops, model(a, b), tuple(teacher), backend="reference").backward()
    return {key: parameter.grad for key, parameter in model.named_parameters()}


def sub_groups(loss: str, leaves: dict, given: dict, frozen: tuple, how: dict) -> Any:
    """Ranks 0 and 2 hold one batch, rank 1 and 3 another, at the same time."""
    from cases import compute

    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return compute(loss, leaves, given, frozen, how | {"group": groups[dist.get_rank() % 2]})


def on_mesh(loss: str, leaves: dict, given: dict, frozen: tuple, how: dict) -> Any:
    from cases import compute
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b"))
    error = ""
    try:
        compute(loss, leaves, given, frozen, how | {"group": mesh})
    except ValueError as found:
        error = str(found)
    return error, compute(loss, leaves, given, frozen, how | {"group": mesh["a"]})


def sharded(rows: list[int], scheme: str) -> dict[str, Any]:
    """Features and a weight that DTensor holds."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    a, b = (unit(sum(rows), WIDTH, seed) for seed in (0, 1))
    weight = distribute_tensor(unit(WIDTH, WIDTH, 2), mesh, [Replicate()]).requires_grad_()
    a, b = (distribute_tensor(t, mesh, [Shard(0)]) for t in (a, b))
    loss = distributed.clip_loss(a @ weight, b @ weight, 5.0, scheme=scheme)
    loss.backward()
    grad = weight.grad
    assert isinstance(grad, DTensor)
    errors = []
    replicated = a.redistribute(mesh, [Replicate()])
    for x, y in ((replicated, replicated), (a, b.to_local())):
        try:
            distributed.clip_loss(x, y, 5.0)
        except ValueError as error:
            errors.append(str(error))
    return {"loss": loss.detach(), "grad": grad.full_tensor(), "errors": errors}


def backwards(first: int, losses: tuple[str, str], rows: tuple[int, int], how: dict) -> str:
    """The error of two backward passes, of which rank 1 begins with loss `first`."""
    found = []
    for seed, (loss, n) in enumerate(zip(losses, rows, strict=True)):
        x, y = (unit(n, 8, seed + dist.get_rank() + i).requires_grad_() for i in (0, 9))
        scale, teacher = torch.tensor(5.0, requires_grad=True), []
        if loss == "similarity_distill":
            teacher = [x.detach(), y.detach(), 4.0]
        found.append(getattr(distributed, loss)(x, y, scale, *teacher, **how))
    try:
        for at in (first, 1 - first) if dist.get_rank() == 1 else (0, 1):
            found[at].backward(torch.ones_like(found[at]))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def made_of_parts(over: Any, leaves: dict[str, Tensor], ids: tuple, mean: Any, **how: Any) -> dict:
    """A loss that is not here: the mean log-sum-exp of rows and of columns, less a dot product."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    x, y, scale = leaves.values()
    rows, cols = over.similarity_lse(x, y, scale, row_ids=ids[0], col_ids=ids[1], **how)
    positive = scale * (x * y[: len(x)]).sum(1)
    loss = mean(rows - positive) + mean(cols.clamp(min=-20))
    loss.backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def parts_over_ranks(leaves: dict[str, Tensor], ids: tuple, scheme: str) -> dict[str, Tensor]:
    return made_of_parts(distributed, leaves, ids, distributed.mean, scheme=scheme)


class Counted:
    """Bytes that this rank sends, by the collectives' own formulas."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def __enter__(self) -> "Counted":
        size, rank = dist.get_world_size(), dist.get_rank()
        gather, swap, ring = (
            dist.all_gather_into_tensor, dist.all_to_all_single, dist.batch_isend_irecv
        )  # fmt: skip

        def gathered(out: Tensor, own: Tensor, **more: Any) -> Any:
            self.sent["gather"] += (size - 1) * own.nbytes
            return gather(out, own, **more)

        def swapped(out: Tensor, own: Tensor, outs: list, ins: list, **more: Any) -> Any:
            row = own.nbytes // max(1, own.shape[0])
            self.sent["swap"] += row * (sum(ins) - ins[rank])
            return swap(out, own, outs, ins, **more)

        def passed(operations: list) -> Any:
            for operation in operations:
                if operation.op is dist.isend:
                    self.sent["ring"] += operation.tensor.nbytes
            return ring(operations)

        # Whatever else would send is refused.
        others = (
            "all_gather", "all_reduce", "all_to_all", "broadcast", "gather",
            "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
        )  # fmt: skip
        self._patches = [
            mock.patch.object(dist, "all_gather_into_tensor", gathered),
            mock.patch.object(dist, "all_to_all_single", swapped),
            mock.patch.object(dist, "batch_isend_irecv", passed),
            *(mock.patch.object(dist, name, None) for name in others),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self._patches:
            patch.stop()


def counted(loss: str, leaves: dict, given: dict, frozen: tuple, how: dict) -> dict[str, int]:
    from cases import compute

    with Counted() as found:
        compute(loss, leaves, given, frozen, how)
    return dict(found.sent)


def dies(last: int) -> tuple[str, float]:
    """Rank `last` is killed before the others' loss needs it: their error, and its time."""
    x, y = unit(4, 8, 0).requires_grad_(), unit(4, 8, 1)
    if dist.get_rank() == last:
        distributed.clip_loss(x, y, 5.0)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        distributed.clip_loss(x, y, 5.0).backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "", 0.0


def compiled_and_cast(rows: list[int]) -> dict[str, Any]:
    """The module under torch.compile, and under autocast."""
    rank = dist.get_rank()
    x, y = (unit(sum(rows), 16, seed).split(rows)[rank] for seed in (0, 1))
    found = {}
    for name in ("plain", "compiled", "cast"):
        leaf = x.clone().requires_grad_()
        module = losses.ClipLoss(world_size=len(rows), rank=rank)

        def whole(a: Tensor, b: Tensor, module: Any = module) -> Tensor:
            return 2 * module(a * 1.0, b, torch.tensor(14.2857))

        call = torch.compile(whole, backend="eager") if name == "compiled" else whole
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "cast"):
            loss = call(leaf, y)
        loss.backward()
        found[name] = loss.detach(), leaf.grad
    return found
