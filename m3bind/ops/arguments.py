"""Checks and conversions that every operator's wrapper does before it calls a backend."""

import math
import numbers
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from m3bind.dtypes import accumulation_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def features(
    op: str, x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")
) -> tuple[Tensor, Tensor]:
    """The pair of feature matrices, checked, and cast where autocast is on."""
    x_name, y_name = names
    for name, value in zip(names, (x, y), strict=True):
        if not isinstance(value, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, not {type(value).__name__}")
        if value.dim() != 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(value.shape)}; pass a matrix [rows, features]"
            )
    if x.device != y.device:
        raise ValueError(
            f"{op}: {x_name} is on {x.device}, {y_name} on {y.device}; move one of them"
        )
    if x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"{op}: {x_name} has {x.shape[1]} features a row, {y_name} has {y.shape[1]}; "
            "they must be equal and at least 1"
        )
    # Only the features are cast: a scale of 14.2857 would become 14.3125 in bfloat16.
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(dtype), y.to(dtype)
    if x.dtype != y.dtype:
        raise ValueError(f"{op}: {x_name} is {x.dtype}, {y_name} is {y.dtype}; cast one of them")
    if x.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{op}: features are {x.dtype}; cast them to one of {known}")
    return x, y


def paired(op: str, x: Tensor, y: Tensor) -> None:
    """Each row has its own column."""
    if x.shape[0] > y.shape[0]:
        raise ValueError(
            f"{op}: x has {x.shape[0]} rows, y has {y.shape[0]}: row i of x belongs to row i of y, "
            "so rows are left over; pass labels or positive_ids, or swap x and y"
        )


def same_rows(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two feature matrices, of whatever width, describe the same rows."""
    if value.shape[0] != other.shape[0] or value.device != other.device:
        raise ValueError(
            f"{op}: {name} has {value.shape[0]} rows on {value.device}, {other_name} has "
            f"{other.shape[0]} on {other.device}; pass features of the same rows, on one device"
        )


def scalar(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A scale or bias, as a number or a tensor [] or [1] (FSDP2), as a 0-D tensor beside `like`."""
    acc = accumulation_dtype(like.dtype)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
            raise ValueError(
                f"{op}: {name} must be a number or a tensor, not {type(value).__name__}"
            )
        if torch.finfo(acc).max < abs(value) < math.inf:
            raise ValueError(f"{op}: {name}: the number is too large for {acc}")
        return torch.full((), float(value), dtype=acc, device=like.device)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)} and is {value.dtype}; "
            "pass one floating-point value, shape [] or [1]"
        )
    # Every operator here costs its time twice, also the one that changes nothing.
    if value.dim() > 0:
        value = value.reshape(())
    fits = value.dtype == acc and value.device == like.device
    return value if fits else value.to(device=like.device, dtype=acc)


def gradient_wanted(*tensors: Tensor) -> bool:
    """By reverse mode, at any level of torch.func."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not torch.is_grad_enabled():
        return False
    return torch._C._any_requires_grad(*tensors) or any(
        at_level.requires_grad for t in tensors for at_level in _levels(t)
    )


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """The context for what follows the cast of the features."""
    if not torch.is_autocast_enabled(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def ids(op: str, name: str, value: Tensor, like: Tensor) -> Tensor:
    """One int64 id for each row of `like`."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: {name} must be an int64 tensor, not {kind}")
    if value.shape != like.shape[:1] or value.device != like.device:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)} on {value.device}; "
            f"pass [{like.shape[0]}] on {like.device}"
        )
    return value


def id_pair(
    op: str, name: str, value: Tensor | tuple[Tensor, Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids of the rows and of the columns; one tensor stands for both."""
    both = (value, value) if isinstance(value, Tensor) else value
    if not isinstance(both, tuple | list) or len(both) != 2:
        raise ValueError(
            f"{op}: {name} must be one tensor, or two: ids of the rows and of the columns; "
            f"not {type(value).__name__}"
        )
    return ids(op, f"{name} of the rows", both[0], x), ids(op, f"{name} of the columns", both[1], y)


def excluded(
    op: str, value: Tensor | tuple[Tensor, Tensor] | None, queries: Tensor, gallery: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Ids of pairs that must not be found."""
    return (None, None) if value is None else id_pair(op, "exclude_ids", value, queries, gallery)


def labels(op: str, value: Tensor, x: Tensor, num_columns: int | None) -> Tensor:
    """The column of each row's positive; below 0: none. None: their number is not known yet."""
    value = ids(op, "labels", value, x)
    if num_columns is not None:
        below(op, "labels", value, num_columns)
    return value


def label_lists(op: str, value: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The columns [N, P] that each row asks for, of [N] or [N, P]; below 0: none."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: labels must be an int64 tensor, not {kind}")
    rows = x.shape[0]
    if value.dim() not in (1, 2) or value.shape[0] != rows or value.device != x.device:
        raise ValueError(
            f"{op}: labels has shape {tuple(value.shape)} on {value.device}; pass [{rows}] or "
            f"[{rows}, P] on {x.device}"
        )
    below(op, "labels", value, y.shape[0])
    return value if value.dim() == 2 else value[:, None]


def integer(op: str, name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{op}: {name} must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name}={value}; pass an integer from {low} to {high}")
    return value


def below(op: str, name: str, value: Tensor, bound: int) -> None:
    """Every value names one of `bound` columns."""
    if not _holds(value < bound, f"{op}: {name} must be below {bound}, the number of columns"):
        largest = int(plain(value).max())
        raise ValueError(
            f"{op}: {name} contains {largest}, but there are {bound} columns; pass 0 to "
            f"{bound - 1}, or -100 for none"
        )


def _holds(each: Tensor, message: str) -> bool:
    """Whether all are true. On a GPU, and where it is compiled, a kernel asserts it."""
    if each.device.type == "cpu" and not torch.compiler.is_compiling():
        return bool(plain(each).all())
    torch._assert_async(each.all(), message)
    return True


def plain(value: Tensor) -> Tensor:
    """The tensor itself, of all calls at once, where torch.func.vmap makes one of many."""
    *_, innermost = _levels(value)
    return innermost


def _levels(value: Tensor) -> Iterator[Tensor]:
    """What torch.func makes of a tensor, from outside to the tensor itself."""
    yield value
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
        yield value


def negatives(op: str, value: Tensor, x: Tensor) -> Tensor:
    """Further columns, [K, D] for all rows or [N, K, D]."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: negatives must be a floating-point tensor, not {kind}")
    rows, features = x.shape
    fits = value.dim() in (2, 3) and value.shape[-1] == features
    if not fits or (value.dim() == 3 and value.shape[0] != rows) or value.device != x.device:
        raise ValueError(
            f"{op}: negatives has shape {tuple(value.shape)} on {value.device}; pass "
            f"[K, {features}] or [{rows}, K, {features}] on {x.device}"
        )
    return value.to(x.dtype)


def soft_targets(
    op: str, value: tuple[Tensor, Tensor], x: Tensor, num_columns: int | None
) -> tuple[Tensor, Tensor]:
    """Columns [N, K] and their weights [N, K]. None: the number of columns is not known yet."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(
            f"{op}: soft_targets must be (columns, weights), not {type(value).__name__}"
        )
    columns, weights = value
    for name, tensor in (("columns", columns), ("weights", weights)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.shape[0] != x.shape[0]:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{op}: {name} of soft_targets: {shape}; pass a tensor [{x.shape[0]}, K]"
            )
    if columns.dtype != torch.int64 or not weights.is_floating_point():
        raise ValueError(
            f"{op}: soft_targets are {columns.dtype} and {weights.dtype}; pass int64 columns and "
            "floating-point weights"
        )
    if columns.shape != weights.shape or {columns.device, weights.device} != {x.device}:
        raise ValueError(
            f"{op}: soft_targets have shapes {tuple(columns.shape)} and {tuple(weights.shape)} on "
            f"{columns.device} and {weights.device}; pass the same shape on {x.device}"
        )
    if num_columns is not None:
        below(op, "columns of soft_targets", columns, num_columns)
    # NaN goes on, into the loss.
    if not _holds(
        (columns < 0) | ~(weights < 0), f"{op}: weights of soft_targets must be at least 0"
    ):
        least = float(plain(weights.where((columns >= 0) & (weights < 0), 0)).min())
        raise ValueError(
            f"{op}: weights of soft_targets contain {least:g}; pass numbers of at least 0"
        )
    return columns, weights.detach()


def number(
    op: str, name: str, value: float, low: float = -math.inf, high: float = math.inf
) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{op}: {name} must be a number, not {type(value).__name__}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{op}: {name}: the number is too large")
    if not low <= value <= high:
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise ValueError(f"{op}: {name}={value}; pass a number {limits}")
    return float(value)


def one_of(op: str, **given: object) -> None:
    """At most one of the arguments is given."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{op}: {' and '.join(names)} exclude each other; pass one of them")


def choice(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{op}: {name}={value!r}: choose one of {', '.join(known)}")
