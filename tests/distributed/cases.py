"""What the ranks compute, and the truth: the same loss of the whole batch in one process."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind import distributed, ops


@dataclass(kw_only=True)
class Case:
    """A batch of all ranks. Of `rows` and `columns` each rank gets its part, of what is in
    `options` all get the same; what is in `leaves` has gradients."""

    loss: str
    row_counts: list[int]
    col_counts: list[int]
    leaves: dict[str, Tensor]  # x, y, scale and perhaps bias, negatives
    rows: dict[str, Any] = field(default_factory=dict)  # of [N, ...]
    columns: dict[str, Any] = field(default_factory=dict)  # of [M, ...]; joined with `rows` of ids
    extra: dict[str, list[int]] = field(default_factory=dict)  # counts of other leaves
    options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


def unit(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def pieces(value: Any, counts: list[int]) -> list[Any]:
    if isinstance(value, tuple):
        return list(zip(*(pieces(part, counts) for part in value), strict=True))
    return list(value.split(counts))


def parts(case: Case) -> list[tuple]:
    """Each rank's arguments of `compute`."""
    size = len(case.row_counts)
    leaves = [dict(case.leaves) for _ in range(size)]
    given: list[dict[str, Any]] = [{} for _ in range(size)]
    counts = {"x": case.row_counts, "y": case.col_counts, **case.extra}
    for name, value in case.leaves.items():
        if name in counts:
            for rank, piece in enumerate(pieces(value, counts[name])):
                leaves[rank][name] = piece
    for name, value in case.rows.items():
        for rank, piece in enumerate(pieces(value, case.row_counts)):
            given[rank][name] = piece
    for name, value in case.columns.items():
        for rank, piece in enumerate(pieces(value, case.col_counts)):
            given[rank][name] = (given[rank][name], piece) if name in given[rank] else piece
    return [(case.loss, leaves[rank], given[rank], case.frozen) for rank in range(size)]


def call(loss: Any, leaves: dict[str, Tensor], given: dict[str, Any]) -> Any:
    leaves, given = dict(leaves), dict(given)
    x, y, scale = (leaves.pop(name) for name in ("x", "y", "scale"))
    if "bias" in leaves:
        given["logit_bias"] = leaves.pop("bias")
    if "teacher_x" in given:
        given["teacher_scale"] = given.get("teacher_scale", 14.0)
    return loss(x, y, scale, **leaves, **given)


def compute(
    loss: str, leaves: dict[str, Tensor], given: dict[str, Any], frozen: tuple[str, ...],
    how: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Runs in each rank: what it finds, its gradients, and what it kept for them."""
    how = dict(how)
    backwards, weights = how.pop("backwards", 1), how.pop("weights", None)
    leaves = {k: t.clone().requires_grad_(k not in frozen) for k, t in leaves.items()}
    saved: list[int] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        found = call(getattr(distributed, loss), leaves, {**given, **how})
    outputs = found if isinstance(found, tuple) else (found,)
    weights = weights and [w.to(t.dtype) for w, t in zip(weights, outputs, strict=True)]
    for again in range(backwards):
        torch.autograd.backward(outputs, weights, retain_graph=again < backwards - 1)
    return {
        "outputs": [t.detach() for t in outputs],
        "grads": {k: t.grad for k, t in leaves.items() if k not in frozen},
        "saved": max(saved, default=0),  # elements of the largest tensor
    }


def truth(case: Case, weights: list[Tensor] | None = None, exact: bool = True) -> dict[str, Any]:
    """In float64, of the same rounded features; not exact: what plain PyTorch makes of it in their
    own dtype, with logits in float32."""

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(wide(v) for v in value)
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if exact and floats else value

    leaves = {k: wide(t).clone().requires_grad_(k not in case.frozen)
              for k, t in case.leaves.items()}  # fmt: skip
    given = {k: wide(v) for k, v in (case.rows | case.columns | case.options).items()}
    for name in case.rows.keys() & case.columns.keys():
        given[name] = (case.rows[name], case.columns[name])
    paired = {"labels", "positive_ids", "soft_targets", "teacher_x"}
    if not paired & given.keys() and case.row_counts != case.col_counts:
        given["labels"] = own_columns(case)
    found = call(getattr(ops, case.loss), leaves, {**given, "backend": "reference"})
    outputs = found if isinstance(found, tuple) else (found,)
    weights = weights and [w.to(t.dtype) for w, t in zip(weights, outputs, strict=True)]
    torch.autograd.backward(outputs, weights)
    return {
        "outputs": [t.detach() for t in outputs],
        "grads": {k: t.grad for k, t in leaves.items() if k not in case.frozen},
    }


def own_columns(case: Case) -> Tensor:
    """Row i of a rank and its own column i."""
    starts = [sum(case.col_counts[:rank]) for rank in range(len(case.col_counts))]
    return torch.cat([torch.arange(n) + s for n, s in zip(case.row_counts, starts, strict=True)])


def averaged(case: Case, found: list[dict]) -> dict[str, Tensor]:
    """What DDP makes of the ranks' gradients: features of their owners, the mean of scalars."""
    size, grads = len(found), {}
    for name in found[0]["grads"]:
        each = [rank["grads"][name] for rank in found]
        shared = name in ("scale", "bias")
        grads[name] = (torch.stack(each).double().mean(0) if shared
                       else torch.cat(each).double() / size)  # fmt: skip
    return grads


def distance(got: Tensor, want: Tensor) -> float:
    """Ratio of norms; a truth of 0 counts by its own norm."""
    norm = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (norm if norm > 1e-12 else 1.0)
