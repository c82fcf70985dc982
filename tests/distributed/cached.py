"""Programs that tests run in each rank: chunked towers under DDP and FSDP2."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from cases import unit
from models import WIDTH, Encoder, batches, loss_of
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from m3bind import GradCache, distributed


def wrapped(wrap: str, module: nn.Module, parts: tuple = (), counts: Counter | None = None) -> Any:
    """Under DDP or FSDP2; how often each synchronises gradients goes into `counts`."""
    name, counts = type(module).__name__, counts if counts is not None else Counter()
    if wrap == "ddp":
        model = DistributedDataParallel(module)

        def reduced(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            counts[name] += 1
            done = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return done.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, reduced)
        return model
    from torch.distributed.fsdp import fully_shard

    def scattered(output: Tensor) -> None:
        counts[name] += 1

    for part in (*parts, module):
        fully_shard(part).set_all_reduce_hook(scattered)
    return module


def full(grad: Any) -> Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k.replace("module.", ""): full(p.grad) for k, p in model.named_parameters()}


def share(tensors: Any, sizes: list[int]) -> list[Tensor]:
    return [t.split(sizes)[dist.get_rank()] for t in tensors]


def encoder(
    wrap: str, name: str, sizes: list[int], steps: int, chunk: int, scheme: str, hold: bool
) -> tuple[dict[str, Tensor], int]:
    """`models.train`, chunk by chunk: gradients after `steps`, and how often they were reduced.
    With `hold` all but the last step leave them where they are."""
    counts: Counter[str] = Counter()
    module = Encoder()
    model = wrapped(wrap, module, (module.left, module.right), counts)

    def loss(*found: Any, teacher: list[Tensor]) -> Tensor:
        return loss_of(name, distributed, found, tuple(teacher), scheme=scheme)

    cache = GradCache([model], loss, chunk)
    for step, batch in enumerate(batches(sizes, steps)):
        a, b, *teacher = share(batch, sizes)
        cache.step((a, b), teacher=teacher, sync=not hold or step == steps - 1)
    return gradients(model), sum(counts.values())


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("mean", torch.zeros(WIDTH))  # DDP broadcasts it in a forward pass

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.net(rows - self.mean), dim=1), self.log_scale.exp()


class Text(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return normalize(super().forward(rows), dim=1)


class Model(nn.Module):
    """One tower for images, one for two kinds of texts; its methods are towers."""

    def __init__(self, image: Any, text: Any) -> None:
        super().__init__()
        self.image, self.text = image, text

    def encode_image(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(rows)

    def encode_text(self, rows: Tensor) -> Tensor:
        return self.text(rows)


def two_texts(over: Any, x: Tensor, scale: Tensor, y: Tensor, z: Tensor, **how: Any) -> Tensor:
    return over.clip_loss(x, y, scale, **how) + over.clip_loss(x, z, 2 * scale, **how)


def towers(wrap: str, sizes: list[int], chunk: int) -> tuple[dict, dict, dict[str, int]]:
    """Gradients after one step and after two; and how often each tower was reduced in both."""
    counts: Counter[str] = Counter()
    model = Model(*(wrapped(wrap, tower, (), counts) for tower in (Image(), Text())))
    cache = GradCache(
        [model.encode_image, model.encode_text, model.encode_text],
        lambda *found: two_texts(distributed, *found), chunk,
    )  # fmt: skip
    given = share([unit(sum(sizes), WIDTH, seed) for seed in range(3)], sizes)
    cache.step(*given)
    found = {k: grad.clone() for k, grad in gradients(model).items()}
    cache.step(*given)  # as the next step would: nothing is left from the first
    return found, gradients(model), dict(counts)


def partial_loss(x: Tensor, scale: Tensor, y: Tensor, rank: int, leaves: dict[int, str]) -> Tensor:
    """A rank's own loss, which may leave out a tower ("y"), or the first one's scale ("s")."""
    left, weights = leaves.get(rank, ""), torch.arange(1.0, WIDTH + 1, dtype=x.dtype)
    loss = (x * weights).square().sum()
    if "s" not in left:
        loss = loss * scale.sum()
    return loss if "y" in left else loss + (y * weights).sum()


def left_out(wrap: str, sizes: list[int], leaves: dict[int, str], evaluate: bool) -> dict:
    """Gradients of two towers whose forward passes shard again."""
    models: list[Any] = [Image(), Text()]
    if wrap == "ddp":
        models = [DistributedDataParallel(m) for m in models]
    else:
        from torch.distributed.fsdp import fully_shard

        for model in models:  # after a forward pass without a graph a root stays gathered
            fully_shard(model, reshard_after_forward=None if evaluate else True)
    rank = dist.get_rank()
    cache = GradCache(models, lambda *found: partial_loss(*found, rank, leaves), 3)
    given = share([unit(sum(sizes), WIDTH, seed) for seed in range(2)], sizes)
    if evaluate:
        with torch.no_grad():
            for model, rows in zip(models, given, strict=True):
                model(rows)
    cache.step(*given)
    return gradients(models[0]) | gradients(models[1])


class Bare(Image):
    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(rows)[0], self.log_scale


def bare_parameter(tower: str) -> tuple[str, Any]:
    """A scale that a sharded module does not compute within what FSDP2 calls its forward pass."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model: Any = Bare() if tower == "itself" else Image()
    for part in (model.net, model):
        fully_shard(part, reshard_after_forward=True)
    model.encode = model.forward
    if tower == "registered method":
        register_fsdp_forward_method(model, "encode")
    encode = model if tower == "itself" else model.encode
    try:
        GradCache([encode], lambda x, scale: x.sum() * scale.sum(), 3).step(unit(4, WIDTH, 0))
    except ValueError as error:
        return str(error), None
    return "", full(model.log_scale.grad)


def scaled(wrap: str, bad_rank: int) -> tuple[bool, float]:
    """Whether a step is skipped on this rank, where one rank's batch overflows."""
    module = Encoder()
    model = wrapped(wrap, module, (module.left, module.right))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [full(p.detach()).clone() for p in model.parameters()]
    a, b = unit(4, WIDTH, dist.get_rank()), unit(4, WIDTH, 5)
    if dist.get_rank() == bad_rank:
        a = a * torch.nan
    cache = GradCache([model], lambda x, y, s, t: distributed.clip_loss(x, y, s) + 0 * t.sum(), 2)
    cache.step((a, b), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    after = [full(p.detach()) for p in model.parameters()]
    skipped = all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    return skipped, scaler.get_scale()
