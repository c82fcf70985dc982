"""Backward passes meet in the same order on every rank, or all ranks say which ones met.

Each call over a group has a number, the same on all its ranks; it travels beside what the backward
pass sends anyway.
"""

from __future__ import annotations  # torch may be built without ProcessGroup

from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

REMEMBERED = 256  # calls whose names an error can tell
EXACT = 1 << 24  # float32 holds the numbers below it


class History:
    """The calls over one group."""

    def __init__(self) -> None:
        self.count = 0
        self._ops: deque[tuple[int, str]] = deque(maxlen=REMEMBERED)
        self._unread: list[tuple[Any, Tensor]] = []

    def begin(self, op: str) -> int:
        unread, self._unread = self._unread, []
        for event, numbers in unread:
            event.synchronize()
            self._compare(numbers)
        self.count += 1
        self._ops.append((self.count, op))
        return self.count

    def met(self, numbers: Tensor) -> None:
        """Of every rank the number of the call it is in."""
        if numbers.device.type == "cpu":
            self._compare(numbers)
            return
        # To read them now would wait for the device; the next call does.
        found = numbers.to("cpu", non_blocking=True)
        event = torch.get_device_module(numbers.device).Event()
        event.record()
        self._unread.append((event, found))

    def _compare(self, numbers: Tensor) -> None:
        found = numbers.tolist()
        if len(set(found)) == 1:
            return
        named = [f"rank {r} in that of {self._name(v)}" for r, v in enumerate(found)]
        raise ValueError(
            f"backward passes of different losses met: {', '.join(named)}; call them in the same "
            "order on every rank, or one backward on the sum of the losses"
        )

    def _name(self, number: float) -> str:  # anything, where rows of another width were read
        ops = (op for count, op in self._ops if count % EXACT == number)
        return f"{next(ops, 'a loss')} (call {number:.0f} of {self.count})"


# By the group itself: one that is made anew takes the old one's name, and may have other ranks.
_histories: WeakKeyDictionary[Any, History] = WeakKeyDictionary()


def history(group: Any) -> History:
    return _histories.setdefault(group, History())


def numbered(values: Tensor, number: int) -> Tensor:  # [L + 1, C] of [L, C]
    return torch.cat([values.new_full((1, *values.shape[1:]), number % EXACT), values])


def parted(found: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The ranks' numbers, and their rows without them."""
    parts = found.split([count + 1 for count in counts])
    numbers = torch.stack([part.reshape(-1)[0] for part in parts])
    return numbers, torch.cat([part[1:] for part in parts])
