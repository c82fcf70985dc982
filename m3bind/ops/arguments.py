"""Checks and conversions that every operator's wrapper does before it calls a backend."""

import torch
from torch import Tensor

from m3bind.reference import accumulation_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def features(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of feature matrices, checked, and cast where autocast is on."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, not {type(value).__name__}")
        if value.dim() != 2:
            raise ValueError(
                f"{op}: {name} has shape {tuple(value.shape)}; pass a matrix [rows, features]"
            )
    if x.device != y.device:
        raise ValueError(f"{op}: x is on {x.device}, y on {y.device}; move one of them")
    if x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"{op}: x has {x.shape[1]} features a row, y has {y.shape[1]}; "
            "they must be equal and at least 1"
        )
    # Only the features are cast: a scale of 14.2857 would become 14.3125 in bfloat16.
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(dtype), y.to(dtype)
    if x.dtype != y.dtype:
        raise ValueError(f"{op}: x is {x.dtype}, y is {y.dtype}; cast one of them")
    if x.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{op}: features are {x.dtype}; cast them to one of {known}")
    return x, y


def scalar(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A scale or bias, as a number or a tensor [] or [1] (FSDP2), as a 0-D tensor beside `like`."""
    acc = accumulation_dtype(like.dtype)
    if not isinstance(value, Tensor):
        if not isinstance(value, int | float):
            raise ValueError(
                f"{op}: {name} must be a number or a tensor, not {type(value).__name__}"
            )
        return torch.full((), float(value), dtype=acc, device=like.device)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)} and is {value.dtype}; "
            "pass one floating-point value, shape [] or [1]"
        )
    return value.reshape(()).to(device=like.device, dtype=acc)


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


def choice(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{op}: {name}={value!r}: choose one of {', '.join(known)}")
