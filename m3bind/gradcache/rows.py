"""Nested arguments and results of towers, by rows."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def is_texts(value: Any) -> bool:
    """A list of strings is rows, as a tensor is; an empty one those of a rank without any."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
        return False
    return all(isinstance(item, str) for item in value) and bool(value or isinstance(value, list))


def leaves(where: str, value: Any) -> Iterator[Any]:
    """All that is cut into rows."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif is_texts(value):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(f"{where}[{name!r}]", item)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            if isinstance(value, list) and not isinstance(item, Tensor | list | tuple | Mapping):
                raise ValueError(
                    f"{where} is a list that holds a {type(item).__name__}: pass rows as a tensor "
                    "or a list of strings, and an option of the tower by functools.partial"
                )
            yield from leaves(f"{where}[{place}]", item)


def count(where: str, value: Any) -> int:
    """The number of rows, on which all leaves agree."""
    lengths = {len(leaf) for leaf in leaves(where, value)}
    if not lengths:
        raise ValueError(
            f"{where} holds no rows: pass a tensor, a list of strings, or a nest of them"
        )
    if len(lengths) > 1:
        raise ValueError(
            f"{where} holds tensors of {sorted(lengths)} rows: their first dimensions must be "
            "equal; what all rows share is bound to the tower by functools.partial"
        )
    return lengths.pop()


def cut(value: Any, part: slice) -> Any:
    """The same nest with these rows only."""
    if isinstance(value, Tensor):
        return value[part] if value.dim() else value
    if is_texts(value):
        return value[part]
    if isinstance(value, Mapping):
        return {name: cut(item, part) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [cut(item, part) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def arguments(value: Any) -> tuple[tuple, dict[str, Any]]:
    """A tuple stands for positional arguments, a mapping for named ones, all else for one."""
    if isinstance(value, Mapping):
        return (), dict(value)
    if isinstance(value, tuple) and not is_texts(value):
        return tuple(value), {}
    return (value,), {}


def named(value: Any) -> dict[Any, Any]:
    """What a tower returned, by place or by name."""
    positional, keywords = arguments(tuple(value) if isinstance(value, list) else value)
    return dict(enumerate(positional)) | keywords


def chunks(rows: int, chunk: int) -> int:
    """A rank without rows calls its towers as well, once."""
    return max(1, -(-rows // chunk))


def spans(rows: int, chunk: int, number: int) -> list[slice]:
    """`number` chunks of at most `chunk` rows: full ones, or where other ranks need more of them
    than these rows fill, equal ones, and empty ones where there are fewer rows than chunks."""
    if number > chunks(rows, chunk):
        ends = [rows * (i + 1) // number for i in range(number)]
    else:
        ends = [min(rows, (i + 1) * chunk) for i in range(number)]
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
