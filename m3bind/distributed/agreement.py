"""The small collective of each call: what the ranks bring, and whether it fits together.

One list of numbers a rank travels. Where it shows that ranks differ, or that a rank could not even
read its arguments, a second exchange carries the words, and every rank raises the same ValueError.
"""

import hashlib
import math
import os
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from m3bind.distributed.exchange import Channel
from m3bind.ops.arguments import DTYPES

DEVICES = ("cpu", "cuda", "mps", "xpu")
NO_NUMBER = -1
MAY_HOLD_NAN = (
    "x", "y", "logit_scale", "logit_bias", "negatives", "teacher_x", "teacher_y", "teacher_scale",
    "weights of soft_targets",
)  # fmt: skip
MODES = {0: "off (torch.no_grad)", 1: "on"}


@dataclass(kw_only=True, slots=True)
class Brought:
    """What one rank brings to a call; every field is a small number."""

    failed: int = 0  # its arguments were wrong
    options: int = 0  # a hash of the arguments that must be the same
    grad_mode: int = 0
    features: int = 0
    teacher_features: int = 0
    dtype: int = 0
    teacher_dtype: int = 0
    device: int = 0
    rows: int = 0
    columns: int = 0
    negatives: int = 0
    listed: int = 0  # targets that each row lists
    largest_column: int = -1  # of those that labels and targets name
    unpaired: int = 0  # it has rows that no column stands for
    has_nan: int = 0  # bits, of MAY_HOLD_NAN
    memory: int = 0  # of the device, MiB
    need_x: int = 0
    need_y: int = 0
    need_negatives: int = 0
    need_scalars: int = 0
    logit_scale: int = NO_NUMBER  # the bits of a number; a tensor's may only be near on all ranks
    logit_bias: int = NO_NUMBER
    teacher_scale: int = NO_NUMBER


NUMBERS = ("logit_scale", "logit_bias", "teacher_scale")
# What must be equal: the name in the error, and how a value reads.
EQUAL: dict[str, tuple[str, Callable[[int], str]]] = {
    "grad_mode": ("gradients ", lambda v: MODES[v]),
    "features": ("features a row: ", str),
    "teacher_features": ("teacher's features a row: ", str),
    "dtype": ("features of ", lambda v: str(DTYPES[v])),
    "teacher_dtype": ("teacher's features of ", lambda v: str(DTYPES[v])),
    "device": ("tensors on ", lambda v: DEVICES[v] if v < len(DEVICES) else f"device kind {v}"),
}
_NAMES = tuple(field.name for field in fields(Brought))


def hashed(options: dict[str, Any]) -> int:
    digest = hashlib.blake2b(repr(sorted(options.items())).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def device_kind(device: torch.device) -> int:
    return DEVICES.index(device.type) if device.type in DEVICES else len(DEVICES)


@cache
def device_memory(device: torch.device) -> int:
    """MiB; the processor's, though ranks on one machine share it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory >> 20
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (AttributeError, OSError, ValueError):  # a system that does not say
        return 1 << 14


def largest(*named: Tensor | None) -> int:
    """The largest column that is named, where finding it costs no synchronisation."""
    found = [int(t.max()) for t in named if t is not None and t.device.type == "cpu" and t.numel()]
    return max(found, default=-1)


def _comparable(option: Any) -> Any:
    """Equal numbers may be written as 0, 0.0 and np.float64(0), and differ by rounding."""
    if isinstance(option, bool) or not isinstance(option, int | float):
        return option
    try:
        return float(f"{float(option):.9g}") + 0.0  # -0 is 0
    except OverflowError:
        return option


def agree(
    op: str,
    channel: Channel,
    brought: Brought,
    options: dict[str, Any],
    error: Exception | None,
) -> list[Brought]:
    """What every rank brings, after it is known to fit together."""
    options = {"loss": op} | {name: _comparable(value) for name, value in options.items()}
    brought.failed = int(error is not None)
    brought.options = hashed(options)
    found = channel.numbers([int(v) for v in asdict(brought).values()])
    ranks = [Brought(**dict(zip(_NAMES, values, strict=True))) for values in found]
    if any(rank.failed for rank in ranks):
        text = "" if error is None else str(error).removeprefix(f"{op}: ")
        _raise_failure(op, channel.texts({"error": text}), error)
    if len({rank.options for rank in ranks}) > 1:
        _raise_options(op, channel.texts({k: repr(v) for k, v in options.items()}))
    for name, (words, shown) in EQUAL.items():
        _must_be_equal(op, words, [shown(getattr(rank, name)) for rank in ranks])
    for name in NUMBERS:
        _must_be_near(op, name, [getattr(rank, name) for rank in ranks])
    check_values(op, ranks)
    return ranks


def _raise_failure(op: str, texts: list[dict[str, str]], error: Exception | None) -> NoReturn:
    said = [f"on rank {r}: {text['error']}" for r, text in enumerate(texts) if text["error"]]
    raise ValueError(f"{op}: {'; '.join(said)}") from error


def _raise_options(op: str, texts: list[dict[str, str]]) -> NoReturn:
    if len({text["loss"] for text in texts}) > 1:
        op = "m3bind.distributed"
    names = {name for text in texts for name in text}
    for name in sorted(names, key=lambda name: (name != "loss", name)):
        _must_be_equal(op, f"{name}=", [str(text.get(name)) for text in texts])
    raise ValueError(f"{op}: the ranks pass different arguments; pass the same on every rank")


def _must_be_equal(op: str, words: str, values: list[str]) -> None:
    if len(set(values)) == 1:
        return
    (common, count), *_ = Counter(values).most_common(1)
    odd = [f"rank {r} has {words}{v}" for r, v in enumerate(values) if v != common]
    who = "the others have" if count > 1 else f"rank {values.index(common)} has"
    raise ValueError(f"{op}: {', '.join(odd)}; {who} {words}{common}; make them equal")


def _must_be_near(op: str, name: str, found: list[int]) -> None:
    """Numbers, where ranks passed such; computed on other machines they may differ by rounding."""
    passed = {r: struct.unpack("<d", struct.pack("<q", v))[0] for r, v in enumerate(found)}
    numbers = [value for r, value in passed.items() if found[r] != NO_NUMBER]
    if any(not math.isclose(value, numbers[0], rel_tol=1e-4, abs_tol=1e-6) for value in numbers):
        texts = ["a tensor" if v == NO_NUMBER else str(passed[r]) for r, v in enumerate(found)]
        _must_be_equal(op, f"{name}=", texts)


def check_values(op: str, ranks: list[Brought], own: int | None = None) -> None:
    """`own`: this rank, which alone is known, and stands for all of `ranks`."""
    columns = sum(rank.columns for rank in ranks)
    for at, rank in enumerate(ranks):
        r = at if own is None else own
        if rank.has_nan:
            names = [n for bit, n in enumerate(MAY_HOLD_NAN) if rank.has_nan >> bit & 1]
            raise ValueError(f"{op}: on rank {r}: NaN in {', '.join(names)} (check=True)")
        if rank.largest_column >= columns:
            raise ValueError(
                f"{op}: on rank {r}: column {rank.largest_column} is named, but all ranks together "
                f"have {columns}; labels and soft_targets count the columns of all ranks, from 0 "
                f"to {columns - 1}"
            )
        if rank.unpaired:
            raise ValueError(
                f"{op}: on rank {r}: x has {rank.rows} rows, y has {rank.columns}: row i of x "
                "belongs to row i of y on its rank, so rows are left over; pass labels or "
                "positive_ids"
            )
