"""What a training wrote down of its checkpoints, read without that training."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from m3bind.errors import M3BindError
from m3bind.train.parts import Parts

FORMAT = "m3bind-checkpoint-4"


class Progress:
    """How far a training is: all of it that is plain numbers."""

    def __init__(self) -> None:
        self.step, self.validated, self.seconds = 0, 0, 0.0
        self.best_step, self.best_score = 0, -math.inf


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _folder(value: Any) -> bool:
    types = {"folder": str, "tensors": int, "numbers": int}
    return isinstance(value, dict) and {k: type(v) for k, v in value.items()} == types


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# What each value of an index is.
_FORM: dict[str, Callable[[Any], bool]] = {
    "step": _count,
    "validated": _count,
    "seconds": _number,
    "best_step": _count,
    "best_score": _number,
    "last": _folder,
    "best": lambda value: value == {} or _folder(value),  # none before the first validation
    "config": lambda value: isinstance(value, dict),
    "layout": lambda value: isinstance(value, list) and all(map(_names, value)),
}


def index_of(out: Path) -> Path:
    return Path(out) / "checkpoints" / "index.json"


def parts_of(out: Path, which: Mapping[str, Any]) -> Parts:
    return Parts(index_of(out).parent / which["folder"], which)


def has_checkpoint(out: Path, since: float = -math.inf) -> bool:
    """Whether a training in ``out`` wrote a checkpoint, later than ``since`` (seconds of 1970)."""
    index = index_of(out)
    return index.is_file() and index.stat().st_mtime > since


def read_checkpoint(out: Path) -> dict[str, Any]:
    """Plain values of the last checkpoint in ``out``: progress, settings, and under "last" and
    "best" which folder beside it has how many tensors and numbers."""
    index = index_of(out)
    try:
        data = json.loads(index.read_text())
    except FileNotFoundError:
        raise M3BindError(f"no checkpoint at {index}") from None
    except ValueError as error:
        raise M3BindError(f"{index} is damaged ({error})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise M3BindError(f"{index} is not of a checkpoint of this version ({FORMAT})")
    missing = _FORM.keys() - data.keys()
    if missing:
        raise M3BindError(f"{index} is damaged: it lacks {', '.join(sorted(missing))}")
    wrong = [name for name, fits in _FORM.items() if not fits(data[name])]
    if data["best_step"] and not data["best"]:
        wrong.append("best")
    for name in wrong:
        raise M3BindError(f"{index} is damaged: {name} is {data[name]!r}")
    return data


def best_weights(out: Path) -> dict[str, Tensor]:
    """The best weights of the training in ``out``, whole, whatever ranks wrote them."""
    return _best(Path(out))[0]


def load_best(task: Any, out: Path) -> int:
    """Give ``task`` the best weights of the run in ``out``; returns their step."""
    weights, step = _best(Path(out))
    task.load_trainable_state(weights)
    return step


def _best(out: Path) -> tuple[dict[str, Tensor], int]:
    data = read_checkpoint(out)
    if not data["best"]:
        raise M3BindError(f"{index_of(out)} names no best weights yet: wait for a validation")
    try:
        return parts_of(out, data["best"]).read("model/"), data["best_step"]
    except M3BindError:
        if read_checkpoint(out)["best"] == data["best"]:
            raise
        return _best(out)  # a training that goes on has found better ones meanwhile
