"""An encoder under DDP and FSDP2, sub-groups, meshes and DTensors."""

import models
import pytest
import torch
from cases import distance, parts, unit
from models import train, train_alone
from test_losses_over_ranks import LOSSES, SCHEMES, case_of, check

from m3bind import ops


@pytest.mark.parametrize("wrap", ("ddp", "fsdp2"))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_encoder(pools, loss, scheme, wrap):
    """Three micro-batches, the second rank's shorter."""
    counts = [8, 5]
    want = train_alone(loss, counts, 3)
    for found in pools(2).run(train, [(wrap, loss, counts, 3, scheme)] * 2):
        for name, value in want.items():
            assert distance(found[name], value) < 3e-6, name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sub_groups(pools, scheme):
    pairs = [case_of("clip_loss", [4, 3], [4, 3], seed=seed) for seed in (0, 5)]
    given = [None] * 4
    for first, case in enumerate(pairs):
        for rank, part in zip((first, first + 2), parts(case), strict=True):
            given[rank] = (*part, {"scheme": scheme})
    found = pools(4).run(models.sub_groups, given)
    for first, case in enumerate(pairs):
        check(case, found[first::2])


def test_device_mesh(pools):
    case = case_of("clip_loss", [4, 3], [4, 3])
    given = [(*part, {}) for part in parts(case)]
    found = pools(4).run(models.on_mesh, [given[0], given[0], given[1], given[1]])
    assert all("DeviceMesh of 2 dimensions" in error for error, _ in found)
    for first in (0, 1):
        check(case, [found[first][1], found[first + 2][1]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sharded_tensors(pools, scheme):
    a, b, weight = (unit(n, models.WIDTH, seed).double() for seed, n in ((0, 5), (1, 5), (2, 6)))
    weight.requires_grad_()
    want = ops.clip_loss(a @ weight, b @ weight, 5.0)
    want.backward()
    for found in pools(2).run(models.sharded, [([3, 2], scheme)] * 2):
        assert distance(found["loss"], want) < 1e-6
        assert distance(found["grad"], weight.grad) < 2e-6
        assert len(found["errors"]) == 2
        assert "redistribute it to (Shard(0),)" in found["errors"][0]
        assert "y is no DTensor" in found["errors"][1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loss_made_of_parts(pools, scheme):
    x, y, ids = unit(9, 6, 0), unit(9, 6, 1), torch.arange(9) // 2
    scale, counts = torch.tensor(9.0), [5, 4]
    given = [
        ({"x": a, "y": b, "scale": scale}, (i, i), scheme)
        for a, b, i in zip(*(t.split(counts) for t in (x, y, ids)), strict=True)
    ]
    found = pools(2).run(models.parts_over_ranks, given)
    leaves = {"x": x.double(), "y": y.double(), "scale": scale.double()}
    want = models.made_of_parts(ops, leaves, (ids, ids), torch.mean, backend="reference")
    for name in ("x", "y"):
        assert distance(torch.cat([rank[name] for rank in found]) / 2, want[name]) < 2e-6
    assert distance((found[0]["scale"] + found[1]["scale"]) / 2, want["scale"]) < 2e-6
    assert all(distance(rank["loss"], want["loss"]) < 1e-6 for rank in found)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ("ddp", "fsdp2"))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("counts", ([8, 5, 0], [3, 0, 1, 6]))
def test_encoder_on_more_ranks(pools, counts, loss, scheme, wrap):
    want = train_alone(loss, counts, 3)
    for found in pools(len(counts)).run(train, [(wrap, loss, counts, 3, scheme)] * len(counts)):
        for name, value in want.items():
            assert distance(found[name], value) < 3e-6, name


def test_compiled_and_under_autocast(pools):
    for found in pools(2).run(models.compiled_and_cast, [([5, 4],)] * 2):
        plain, compiled, cast = (found[name] for name in ("plain", "compiled", "cast"))
        for got, want in zip(compiled, plain, strict=True):
            torch.testing.assert_close(got, want)
        assert cast[0].dtype == torch.float32
        assert 0 < distance(cast[1], plain[1]) < 2e-2
