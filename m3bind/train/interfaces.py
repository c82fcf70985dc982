"""What a training takes, and what it gives."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from m3bind.data.loader import Batch


class Task(Protocol):
    """What can be trained: an nn.Module with these four methods (m3bind.tasks has three)."""

    def __call__(
        self, batches: dict[str, Batch], rng: random.Random
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the losses, whose sum is minimised, and what else the log should show.

        Over ranks ``rng`` is the same on all of them, and must stay so.
        """

    def parameter_groups(self) -> Iterable[Any]:
        """What AdamW takes; a group may have its own ``lr`` and ``weight_decay``."""

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and buffers that move."""

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trainable_state`; raises ValueError for keys that do not fit."""


class Loader(Protocol):
    """An endless stream of batches that can be taken up again (m3bind.data has two)."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, Any]:
        """Plain values, and under "stream" bytes, after the batch that was handed out last."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the batch after it."""

    def load_state_of_others(self, state: dict[str, Any], salt: int) -> None:
        """Go on after what another number of ranks was handed out; ``salt`` is new each time."""


@dataclass(kw_only=True, slots=True)
class FitResult:
    """What `fit` did; ``best_*`` are of the last step, and NaN, where no score was a number."""

    best_step: int
    best_score: float
    steps: int
    seconds: float  # of training, over all resumed parts
    history: list[dict[str, Any]]  # the lines of metrics.jsonl, on the first rank
