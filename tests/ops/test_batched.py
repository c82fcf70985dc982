"""torch.func.vmap: every argument that is a tensor may be one of many."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from drawn import Draw
from operators import FAST
from torch import Tensor

from m3bind.ops import (
    clip_loss,
    siglip_loss,
    similarity_distill,
    similarity_lse,
    similarity_rank,
    similarity_topk,
)

BATCHES, ROWS, COLUMNS, FEATURES = 3, 6, 7, 4


def drawn() -> dict[str, Tensor]:
    draw = Draw(0)
    order = torch.rand(BATCHES, ROWS, COLUMNS, generator=draw.generator).argsort(-1)

    def ids(high: int, count: int) -> Tensor:
        return draw.integers(0, high, BATCHES * count).view(BATCHES, count)

    return {
        "x": draw.normal(BATCHES, ROWS, FEATURES),
        "y": draw.normal(BATCHES, COLUMNS, FEATURES),
        "scale": torch.tensor([1.0, 2.0, 3.0]),
        "teacher": draw.normal(BATCHES, COLUMNS, 5),
        "labels": ids(COLUMNS, ROWS) - 1,
        "row_ids": ids(4, ROWS),
        "col_ids": ids(4, COLUMNS),
        "row_masks": ids(3, ROWS),
        "col_masks": ids(3, COLUMNS),
        "columns": order[..., :2],
        "weights": torch.rand(BATCHES, ROWS, 2, generator=draw.generator),
        "negatives": draw.normal(BATCHES, 5, FEATURES),
    }


def labelled(x, y, scale, labels, **more):
    return clip_loss(x, y, scale, labels=labels, reduction="none", **more)


def featured(x, y, scale, row_ids, col_ids, row_masks, col_masks, negatives, **more):
    return clip_loss(
        x, y, scale, positive_ids=(row_ids, col_ids), mask_ids=(row_masks, col_masks),
        negatives=negatives, label_smoothing=0.1, z_loss=0.1, margin=0.1, **more,
    )  # fmt: skip


def soft(x, y, scale, columns, weights, row_masks, col_masks, **more):
    return clip_loss(
        x, y, scale, soft_targets=(columns, weights), mask_ids=(row_masks, col_masks),
        label_smoothing=0.1, **more,
    )  # fmt: skip


def siglip(x, y, scale, labels, row_masks, col_masks, **more):
    return siglip_loss(x, y, scale, -1.0, labels=labels, mask_ids=(row_masks, col_masks), **more)


def distill(x, y, scale, teacher, row_masks, col_masks, **more):
    return similarity_distill(
        x, y, scale, teacher[: len(x)], teacher, 3.0, mask_ids=(row_masks, col_masks), **more
    )


def lse(x, y, scale, row_ids, col_ids, **more):
    return similarity_lse(x, y, scale, row_ids=row_ids, col_ids=col_ids, **more)


def topk(x, y, row_ids, col_ids, **more):
    return similarity_topk(x, y, 2, exclude_ids=(row_ids, col_ids), **more)


def rank(x, y, labels, **more):
    return similarity_rank(x, y, labels, **more)


CALLS = {f.__name__: f for f in (labelled, featured, soft, siglip, distill, lse, topk, rank)}


def arguments(call: Any) -> list[Tensor]:
    names = call.__code__.co_varnames[: call.__code__.co_argcount]
    tensors = drawn()
    return [tensors[name] for name in names]


def results(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def together(calls: list[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(each) for each in zip(*map(results, calls), strict=True))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_many_at_once_are_one_after_the_other(backend, name):
    call, given = partial(CALLS[name], backend=backend), arguments(CALLS[name])
    want = together([call(*each) for each in zip(*given, strict=True)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        torch.testing.assert_close(results(torch.func.vmap(call)(*given)), want)
        # The batch dimension may stand anywhere, and one argument may serve all.
        moved = [t.movedim(0, -1) for t in given[1:]]
        dims = (None, *(t.dim() - 1 for t in moved))
        got = results(torch.func.vmap(call, dims)(given[0][1], *moved))
    want = together([call(given[0][1], *each) for each in zip(*given[1:], strict=True)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", ("both", "rows", "columns", "siglip"))
@pytest.mark.parametrize("backend", FAST)
def test_gradients_of_many(backend, loss):
    """Also where the features are many and what else has a gradient, the scale, is one."""
    many = drawn()
    found = []
    for dtype, chosen in ((torch.float64, "reference"), (torch.float32, backend)):
        x, y = many["x"].to(dtype), many["y"][:, :ROWS].to(dtype)

        def total(x: Tensor, scale: Tensor, y: Tensor = y, chosen: str = chosen) -> Tensor:
            def one(x: Tensor, y: Tensor) -> Tensor:
                if loss == "siglip":
                    return siglip_loss(x, y, scale, -1.0, backend=chosen)
                return clip_loss(x, y, scale, directions=loss, backend=chosen)

            return torch.func.vmap(one)(x, y).sum()

        found.append(torch.func.grad(total, (0, 1))(x, torch.tensor(2.0, dtype=dtype)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_what_is_wrong_with_one_of_many_is_told(backend):
    many = drawn()
    x, y, columns = many["x"], many["y"], many["columns"]
    labels, weights = many["labels"].clone(), many["weights"].clone()
    labels[2, 3] = 9
    with pytest.raises(ValueError, match="labels contains 9, but there are 7 columns"):
        torch.func.vmap(partial(labelled, backend=backend))(x, y, many["scale"], labels)
    weights[1, 2, 0] = -0.25
    with pytest.raises(ValueError, match=r"weights of soft_targets contain -0\.25;"):
        torch.func.vmap(
            lambda x, y, *soft: clip_loss(x, y, 1.0, soft_targets=soft, backend=backend)
        )(x, y, columns, weights)
