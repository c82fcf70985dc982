"""How the pairs of rows and columns of different ranks come together.

A job (`m3bind.distributed.jobs`) computes on features of some rows and some columns; a scheme shows
it all pairs of this rank's rows with all columns, and in the backward pass, besides, all that this
rank's columns need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from m3bind.distributed.exchange import Channel, Gathered, Transfer
from m3bind.dtypes import accumulation_dtype

SCHEMES = ("auto", "gather", "circulate")
# From this many columns a rank, a block's matrix products take longer than its transfer: on a GPU
# 2*b*b*D operations at 700e12 a second against 2*b*D bytes at 50e9 a second; on CPUs as measured
# (docs/scaling.md).
HIDDEN_COLUMNS_CPU, HIDDEN_COLUMNS = 1 << 10, 1 << 14
NO_LIMIT = 1 << 50
GATHERED_SHARE = 16  # of the device's memory, what gathered features may take


@dataclass(kw_only=True, slots=True, frozen=True)
class Layout:
    """How the rows, or the columns, of the batch are spread."""

    counts: list[int]
    rank: int

    @property
    def total(self) -> int:
        return sum(self.counts)

    def part(self, rank: int) -> slice:
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    @property
    def own(self) -> slice:
        return self.part(self.rank)

    @property
    def whole(self) -> slice:
        return slice(0, self.total)


@dataclass(kw_only=True, slots=True)
class Needs:
    """Which gradients this rank wants, and which any rank does."""

    x: bool
    y: bool
    anywhere_y: bool


class Job(Protocol):
    """What is computed of pairs. The first features of either side are those with gradients."""

    def forward(
        self, x: Sequence[Tensor], y: Sequence[Tensor], rows: slice, cols: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Statistics [C, n] of the rows over these columns, [C, m] of these columns over the rows,
        and what to keep for the backward pass of the same pairs."""

    def backward(
        self, x: Sequence[Tensor], y: Sequence[Tensor], rows: slice, cols: slice,
        kept: Tensor | None, need_x: bool, need_y: bool,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:  # fmt: skip
        """Gradients of x[0], y[0] (no rows where not needed), and scalars to add up."""


class Scheme(Protocol):
    def start(self, x: Sequence[Tensor], y: Sequence[Tensor], needs: Needs) -> list[Tensor]:
        """What is kept of the features for `forward` and `backward`."""

    def forward(
        self, job: Job, x: Sequence[Tensor], y: Sequence[Tensor], held: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """[V, C, n] in V parts to be merged, [C, M] of this rank's rows alone, and what is kept."""

    def backward(
        self, job: Job, x: Sequence[Tensor], y: Sequence[Tensor], held: list[Tensor],
        kept: list[Tensor], needs: Needs,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """Gradients of x[0] and y[0] over the whole batch, and this rank's part of the scalars."""


class Gather:
    """Features of all ranks on every rank; gradients never travel. Deterministic."""

    def __init__(self, channel: Channel, rows: Layout, cols: Layout) -> None:
        self.channel, self.rows, self.cols = channel, rows, cols
        self._rest: list[Gathered] = []

    def start(self, x: Sequence[Tensor], y: Sequence[Tensor], needs: Needs) -> list[Tensor]:
        columns = [self.channel.start_gather(t, self.cols.counts) for t in y]
        # All rows are for the gradients of the columns: they arrive while the forward pass runs.
        if needs.anywhere_y:
            self._rest = [self.channel.start_gather(t, self.rows.counts) for t in x]
        return [gathered.wait() for gathered in columns]

    def forward(
        self, job: Job, x: Sequence[Tensor], y: Sequence[Tensor], held: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        rows, cols, kept = job.forward(x, held, self.rows.own, self.cols.whole)
        return rows[None], cols, [] if kept is None else [kept]

    def rest(self) -> list[Tensor]:
        """What `start` left under way."""
        found, self._rest = [gathered.wait() for gathered in self._rest], []
        return found

    def backward(
        self, job: Job, x: Sequence[Tensor], y: Sequence[Tensor], held: list[Tensor],
        kept: list[Tensor], needs: Needs,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        columns, rows = held[: len(y)], held[len(y) :]
        grad_x, grad_y, scalars = job.backward(
            x, columns, self.rows.own, self.cols.whole, kept[0] if kept else None, needs.x, False
        )
        if needs.y:
            _, grad_y, _ = job.backward(rows, y, self.rows.whole, self.cols.own, None, False, True)
        return grad_x, grad_y, list(scalars)


class Circulate:
    """The columns' features travel round the ranks, and so do their unfinished gradients.

    A rank holds two blocks of them; while it computes on one, the next arrives.
    """

    def __init__(self, channel: Channel, rows: Layout, cols: Layout) -> None:
        self.channel, self.rows, self.cols = channel, rows, cols

    def start(self, x: Sequence[Tensor], y: Sequence[Tensor], needs: Needs) -> list[Tensor]:
        return []

    def rest(self) -> list[Tensor]:
        return []

    def _owner(self, step: int) -> int:
        """Whose block this rank holds after so many steps."""
        return (self.channel.rank - step) % self.channel.size

    def forward(
        self, job: Job, x: Sequence[Tensor], y: Sequence[Tensor], held: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        parts, kept, blocks = [], [], {}
        block = list(y)
        for step in range(self.channel.size):
            coming = self._coming(block, step)
            at = self.cols.part(self._owner(step))
            rows, cols, keep = job.forward(x, block, self.rows.own, at)
            parts.append(rows)
            blocks[self._owner(step)] = cols
            kept += [] if keep is None else [keep]
            block = coming.wait() if coming is not None else block
        ordered = [found for _, found in sorted(blocks.items()) if found is not None]
        return torch.stack(parts), torch.cat(ordered, 1) if ordered else None, kept

    def _coming(self, block: Sequence[Tensor], step: int) -> Transfer | None:
        if step == self.channel.size - 1:
            return None
        return self.channel.pass_on(block, self.cols.counts[self._owner(step + 1)])

    def backward(
        self, job: Job, x: Sequence[Tensor], y: Sequence[Tensor], held: list[Tensor],
        kept: list[Tensor], needs: Needs,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        block = list(y)
        passing: Transfer | None = None
        grad_x = x[0].new_empty(0)
        total: list[Tensor] = []
        for step in range(self.channel.size):
            coming = self._coming(block, step)
            at = self.cols.part(self._owner(step))
            by_x, by_y, scalars = job.backward(
                x, block, self.rows.own, at, kept[step] if kept else None, needs.x,
                needs.anywhere_y,
            )  # fmt: skip
            # 16-bit parts would be rounded once more at each addition.
            by_x, by_y = (g.to(accumulation_dtype(g.dtype)) for g in (by_x, by_y))
            grad_x = by_x if step == 0 else grad_x.add_(by_x)
            total = (
                [*scalars] if step == 0 else [a + b for a, b in zip(total, scalars, strict=True)]
            )
            if needs.anywhere_y:
                if passing is not None:
                    by_y = passing.wait()[0].add_(by_y)
                passing = self.channel.pass_on([by_y], self.cols.counts[self._owner(step + 1)])
            block = coming.wait() if coming is not None else block
        grad_y = passing.wait()[0] if passing is not None else y[0].new_empty(0, y[0].shape[1])
        return grad_x, grad_y, total


def chosen(scheme: str, x: Tensor, rows: Layout, cols: Layout, memory: int) -> str:
    """The scheme itself, of "auto" the one that the batch suggests, of features like `x`; `memory`
    in MiB."""
    if scheme != "auto":
        return scheme
    gathered = (rows.total + cols.total) * x.shape[1] * x.element_size()
    too_large = gathered > memory * 2**20 / GATHERED_SHARE
    enough = HIDDEN_COLUMNS_CPU if x.device.type == "cpu" else HIDDEN_COLUMNS
    hidden = cols.total >= enough * len(cols.counts)
    return "circulate" if too_large or hidden else "gather"
