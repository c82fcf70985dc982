"""Chunked towers under autocast: its casts of weights, and backward passes outside it."""

import pytest
import torch
from test_gradcache import ROWS, Tower, assert_same, clip, gradients, inputs
from torch import Tensor
from torch.nn import functional as F

from m3bind import GradCache


@pytest.mark.parametrize("chunk", (3, ROWS))
def test_autocast(chunk):
    towers, batches = [Tower(0), Tower(1)], inputs()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        for tower in towers:  # a cast weight in the cache, made without a graph
            with torch.no_grad():
                tower(batches[0])
        torch.manual_seed(3)
        GradCache(towers, clip, chunk).step(*batches)
    got = gradients(*towers)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        parts = zip(towers, batches, strict=True)
        x, y = (torch.cat([t(part) for part in b.split(chunk)]) for t, b in parts)
        loss = clip(x, y)
    assert x.dtype == torch.bfloat16
    loss.backward()
    # A weight's gradients of chunks are rounded to 16 bit each, those of one graph once.
    assert_same(got, gradients(*towers), 1e-2 if chunk < ROWS else 1e-6)


def test_steps_of_an_optimizer_within_one_autocast_block():
    """Autocast keeps cast weights until its block ends; none of them may be of another step."""

    def trained(blocks: int) -> list[Tensor]:
        towers, batches = [Tower(0, 0.0), Tower(1, 0.0)], inputs()
        optimizer = torch.optim.SGD([p for t in towers for p in t.parameters()], lr=1.0)
        for _ in range(blocks):
            with torch.autocast("cpu", torch.bfloat16):
                for _ in range(4 // blocks):
                    GradCache(towers, clip, 3).step(*batches)
                    optimizer.step()
                    optimizer.zero_grad()
        return [p.detach() for t in towers for p in t.parameters()]

    for got, want in zip(trained(1), trained(4), strict=True):
        assert torch.equal(got, want)


def test_no_pass_takes_weights_that_autocast_cast_before():
    """A change of the weights, which only a new cast can show, before each pass and after."""
    tower, batch = Tower(0, 0.0), inputs()[0]
    weights, found = tower.outer.weight, []

    def changed(factor: float) -> Tensor:
        with torch.no_grad():
            weights.mul_(factor)
            return F.linear(torch.ones(1, 16), weights)

    def fresh() -> Tensor:
        return F.linear(torch.ones(1, 16).bfloat16(), weights.detach().bfloat16())

    def loss(x: Tensor) -> Tensor:
        found.append(x.detach().clone())
        assert torch.equal(changed(0.5), fresh())
        changed(2.0)
        torch.clear_autocast_cache()
        return x.float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            tower(batch)
        changed(4.0)
        GradCache([tower], loss, ROWS).step(batch)
        assert torch.equal(changed(0.5), fresh())
    changed(2.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(found[0], tower(batch))


def test_backward_runs_outside_autocast():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    class Looking(Tower):
        def forward(self, rows):
            assert torch.is_autocast_enabled("cpu")
            return Look.apply(super().forward(rows))

    with torch.autocast("cpu", torch.bfloat16):
        GradCache([Looking()], lambda x: Look.apply(x.float().sum()), 4).step(inputs()[0])
    assert seen == [False] * 4
