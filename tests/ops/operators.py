"""Every public operator in one form, so that one test can ask the same of all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from clip_oracle import needs_native, unit_pairs
from distill_oracle import features
from torch import Tensor

from m3bind.ops import (
    clip_loss,
    siglip_loss,
    similarity_distill,
    similarity_lse,
    similarity_rank,
    similarity_topk,
)

# The backends that the contract asks: a new one is added here.
FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)

Leaves = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """``call(**leaves, backend=...)`` gives what the operator gives, for the leaves of ``make``.

    ``options`` are further arguments with which derivatives are checked; ``differentiable`` names
    the leaves that get a gradient, the others among ``rounded`` are rounded by autocast alone.
    """

    make: Callable[..., Leaves]
    call: Callable[..., Any]
    options: tuple[dict[str, Any], ...] = ({},)
    differentiable: tuple[str, ...] = ("x", "y", "logit_scale")
    rounded: tuple[str, ...] = ("x", "y")
    rtol: float = 1e-6  # of results from strided inputs
    atol: float = 1e-7

    def outputs(self, leaves: Leaves, **more: Any) -> tuple[Tensor, ...]:
        found = self.call(**leaves, **more)
        return found if isinstance(found, tuple) else (found,)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pairs(n: int = 20, d: int = 7, *, dtype: torch.dtype = torch.float32, **scalars: float):
    """x and y of n unit rows, and the scalars in the dtype that goes with them."""
    x, y = unit_pairs(n, d, seed=0, dtype=dtype)
    return {"x": x, "y": y} | {k: torch.tensor(v, dtype=wide(dtype)) for k, v in scalars.items()}


def more_columns(n: int = 20, d: int = 7, *, dtype: torch.dtype = torch.float32, **scalars: float):
    """As `pairs`, with four columns more than rows."""
    made = pairs(n, d, dtype=dtype, **scalars)
    return made | {"y": torch.cat([made["y"], made["x"][:4]])}


def taught(n: int = 20, d: int = 7, *, dtype: torch.dtype = torch.float32, scale: float = 10.0):
    x, y, teacher_x, teacher_y = features(n, n + 10, d, 5, seed=0, dtype=dtype)
    scales = {"logit_scale": scale, "teacher_scale": 14.0}
    made = {"x": x, "y": y, "teacher_x": teacher_x, "teacher_y": teacher_y}
    return made | {k: torch.tensor(v, dtype=wide(dtype)) for k, v in scales.items()}


def searched(n: int = 20, d: int = 7, *, dtype: torch.dtype = torch.float32):
    queries, gallery = unit_pairs(n, d, seed=0, dtype=dtype)
    return {"queries": queries, "gallery": torch.cat([gallery, queries[:4]])}


def counted(rows: Tensor) -> Tensor:
    """0, 1, 2, ... for the rows, where they are."""
    return torch.arange(len(rows), device=rows.device)


def halves(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Ids that two neighbours share."""
    return counted(x) // 2, counted(y) // 2


def lse(x: Tensor, y: Tensor, logit_scale: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    row_ids, col_ids = halves(x, y)
    return similarity_lse(x, y, logit_scale, row_ids=row_ids, col_ids=col_ids, **more)


def siglip(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, **more: Any) -> Tensor:
    ids = {name: halves(x, y) for name in more.pop("ids", ())}
    return siglip_loss(x, y, logit_scale, logit_bias, **ids, **more)


def distill(*, masked: bool = False, **given: Any) -> Any:
    if masked:
        given["mask_ids"] = (counted(given["x"]) // 2, counted(given["y"]))
    return similarity_distill(**given)


def topk(queries: Tensor, gallery: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    ids = counted(queries), counted(gallery)
    return similarity_topk(queries, gallery, 3, exclude_ids=ids, **more)


def rank(queries: Tensor, gallery: Tensor, **more: Any) -> Tensor:
    return similarity_rank(queries, gallery, counted(queries), **more)


IDS = ((), ("mask_ids",), ("positive_ids",))
# GEMMs of other strides may round logits of 10 otherwise, which the scale of 10 multiplies; in what
# is not divided by the number of rows, it shows.
LOOSE = {"rtol": 1e-5, "atol": 3e-6}
SIGLIP = {"differentiable": ("x", "y", "logit_scale", "logit_bias"), **LOOSE}
SEARCH = {"make": searched, "rounded": ("queries", "gallery")}

OPERATORS = {
    "clip_loss": Operator(make=partial(pairs, logit_scale=10.0), call=clip_loss),
    "clip_loss of rows": Operator(
        make=partial(more_columns, logit_scale=10.0), call=partial(clip_loss, directions="rows")
    ),
    "similarity_lse": Operator(make=partial(more_columns, logit_scale=3.0), call=lse),
    "siglip_loss": Operator(
        make=partial(pairs, logit_scale=10.0, logit_bias=-3.0), call=siglip,
        options=tuple({"reduction": r, "ids": ids} for r in ("sum", "mean") for ids in IDS),
        **SIGLIP,
    ),
    "siglip_loss of rows": Operator(
        make=partial(more_columns, logit_scale=10.0, logit_bias=-3.0),
        call=partial(siglip, reduction="none"), options=tuple({"ids": ids} for ids in IDS),
        **SIGLIP,
    ),
    "similarity_distill": Operator(
        make=taught, call=distill, rounded=("x", "y", "teacher_x", "teacher_y"),
        options=tuple({"kind": kind, "masked": True} for kind in ("ce", "kl")),
    ),
    "similarity_distill of rows and columns": Operator(
        make=taught, call=partial(distill, reduction="none", masked=True),
        rounded=("x", "y", "teacher_x", "teacher_y"),
        options=tuple({"kind": kind} for kind in ("ce", "kl")), **LOOSE,
    ),
    "similarity_topk": Operator(call=topk, differentiable=("queries", "gallery"), **SEARCH),
    "similarity_rank": Operator(call=rank, differentiable=(), **SEARCH),
}  # fmt: skip
LOSSES = tuple(name for name in OPERATORS if name.startswith(("clip", "sig", "similarity_d")))
DIFFERENTIABLE = tuple(name for name, operator in OPERATORS.items() if operator.differentiable)


def results(operator: Operator, leaves: Leaves, call: Callable[..., Any] | None = None, **more):
    """Outputs, and gradients of what is differentiable, on fresh leaves, by name."""
    given = {k: t.detach().clone().requires_grad_(k in operator.differentiable)
             for k, t in leaves.items()}  # fmt: skip
    found = (call or operator.call)(**given, **more)
    outputs = found if isinstance(found, tuple) else (found,)
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    floating = [output for output in outputs if output.requires_grad]
    if floating:
        weights = [torch.linspace(1, 2, t.numel()).to(t).view(t.shape) for t in floating]
        torch.autograd.backward(floating, weights)
    return named | {name: given[name].grad for name in operator.differentiable}


def opchecks(name: str, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The torch operators behind a public one, with arguments of every kind."""
    return OPCHECKS[name](torch.ops.m3bind, backend)


def _needing(leaves: list[Tensor], needs: tuple[bool, ...] = (True,) * 9) -> list[Tensor]:
    return [t.detach().clone().requires_grad_(need) for t, need in zip(leaves, needs, strict=False)]


NEEDS = ((True, True), (True, False), (False, True), (False, False))


def _stats(ops: Any, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    leaves = list(more_columns(13, logit_scale=3.0).values())
    rows, cols = torch.arange(13).int(), torch.arange(17).int()
    ids, mask = (rows // 2 * 4, cols // 2 * 4), (rows // 2 % 3, cols // 2 % 3)
    for held, kept_rows in (
        ((None,) * 4, 9), ((*ids, None, None), 0), ((None, None, *mask), 0), ((*ids, *mask), 9),
    ):  # fmt: skip
        yield (
            ops.similarity_stats_fwd.default,
            (*_needing(leaves), *held, 0.1, True, kept_rows, backend),
        )
    given = (*leaves, *ids, *mask, 0.1, True)
    rows, cols, kept = ops.similarity_stats_fwd(*given, 9, backend)
    for needs in NEEDS:
        saved = (rows[0], cols[0], kept, rows, cols)
        yield ops.similarity_stats_bwd.default, (*given, *saved, *needs, backend)


def _info_nce(ops: Any, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    leaves = list(more_columns(13, logit_scale=3.0).values())
    for mean, kept_rows in ((True, 0), (False, 13)):
        yield ops.info_nce_fwd.default, (*_needing(leaves), 0.1, mean, kept_rows, backend)
    _, *saved = ops.info_nce_fwd(*leaves, 0.1, True, 9, backend)
    for needs in NEEDS:
        grad = torch.tensor(0.5)
        yield ops.info_nce_bwd.default, (*leaves, 0.1, True, *saved, grad, *needs, backend)


def _siglip(ops: Any, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    leaves = list(more_columns(13, logit_scale=3.0, logit_bias=-1.0).values())
    ids = torch.arange(17).int()
    for paired in (True, False):
        held = (ids[:13] // 2, ids // 2, ids[:13] // 3, ids // 3) if paired else (None,) * 4
        yield ops.siglip_fwd.default, (*_needing(leaves), *held, backend)
        for needs in NEEDS:
            yield ops.siglip_bwd.default, (*leaves, *held, torch.rand(13), *needs, backend)
            some = _needing(leaves, (*needs, True, True))
            yield ops.siglip_total_fwd.default, (*some, *held, paired, *needs, backend)
    grads = ops.siglip_total_fwd(*leaves, *held, True, True, True, backend)[1:]
    yield ops.siglip_total_bwd.default, (torch.tensor(0.5), *leaves, *grads)


def _distill(ops: Any, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x, y, *teacher = features(13, 17, 7, 5, seed=0)
    leaves = [x, y, torch.tensor(3.0)]
    others = [*(t.half() for t in teacher), torch.tensor(9.0)]
    for masks in ((torch.arange(13).int() // 2, torch.arange(17).int()), (None, None)):
        for kl, kept_rows in ((True, 0), (False, 9)):
            yield (
                ops.similarity_distill_fwd.default,
                (*_needing(leaves), *others, *masks, kl, kept_rows, backend),
            )
        given = (*leaves, *others, *masks)
        row_loss, col_loss, *held = ops.similarity_distill_fwd(*given, True, 9, backend)
        for needs in NEEDS:
            saved = (*held, row_loss, col_loss)
            yield ops.similarity_distill_bwd.default, (*given, *saved, *needs, backend)


def _topk(ops: Any, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    leaves, ids = list(unit_pairs(9, 5, seed=0)), torch.arange(9) * 5 % 7
    forward = ops.similarity_topk_fwd.default
    yield forward, (*_needing(leaves), 4, ids, ids, backend)
    yield forward, (*_needing(leaves), 12, None, None, backend)
    values, indices = forward(*leaves, 12, ids, ids, backend)
    for needs in NEEDS[:3]:
        yield ops.similarity_topk_bwd.default, (*leaves, indices, values, *needs)


def _listed(ops: Any, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    leaves, columns = list(unit_pairs(9, 5, seed=0)), torch.arange(18).view(9, 2) % 7
    for needs in NEEDS:
        yield ops.listed_dots_fwd.default, (*_needing(leaves, needs), columns)
        yield ops.listed_dots_bwd.default, (*leaves, columns, torch.rand(9, 2), *needs)


def _rank(ops: Any, backend: str) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    leaves, ids = unit_pairs(9, 5, seed=0), torch.arange(9) * 5 % 7
    labels = torch.arange(18).view(9, 2) % 11 - 2
    for held in ((ids, ids), (None, None)):
        yield ops.similarity_rank_fwd.default, (*leaves, labels, *held, backend)


OPCHECKS = {
    "similarity_stats": _stats,
    "info_nce": _info_nce,
    "siglip": _siglip,
    "similarity_distill": _distill,
    "similarity_topk": _topk,
    "similarity_rank": _rank,
    "listed_dots": _listed,
}
