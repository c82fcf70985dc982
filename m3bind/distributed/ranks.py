"""A batch over ranks: the answers to what losses ask of it (`m3bind.ops.ranks`)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from m3bind.distributed import agreement, schemes
from m3bind.distributed.agreement import Brought
from m3bind.distributed.calls import Call, check_options
from m3bind.distributed.exchange import Channel
from m3bind.distributed.functions import (
    KnownGradient,
    OwnColumns,
    Paired,
    SummedGradient,
    Total,
    Weighted,
)
from m3bind.distributed.jobs import ListedJob, StatsJob
from m3bind.distributed.prepared import Prepared
from m3bind.distributed.schemes import Layout, Needs
from m3bind.dtypes import statistics_dtype
from m3bind.ops import pairs
from m3bind.ops.ranks import Losses


def meet(
    op: str,
    call: Call,
    prepare: Callable[[], Prepared],
    options: dict[str, Any],
    *,
    diagonal: bool,
    scheme: str,
    sizes: str,
    check: bool,
) -> tuple[Prepared, "OverRanks"]:
    """This rank's arguments, and the batch of all ranks; an error of any is raised by all."""
    channel = call.channel
    assert channel is not None
    prepared = error = None
    try:
        check_options(op, scheme, sizes)
        prepared = prepare()
        brought = prepared.brought(op, diagonal, check)
    except Exception as found:
        if sizes == "static":
            raise
        error, brought = found, Brought()
    if sizes == "static":
        # Not by the memory of this rank's device, which may differ from that of others.
        agreed = [replace(brought, memory=schemes.NO_LIMIT)] * channel.size
        agreement.check_values(op, agreed, channel.rank)
    else:
        options = options | call.options | {"scheme": scheme}
        agreed = agreement.agree(op, channel, brought, options, error)
    assert prepared is not None
    channel.begin(op)
    return prepared, OverRanks(channel, prepared, agreed, scheme)


class OverRanks:
    def __init__(
        self, channel: Channel, prepared: Prepared, agreed: list[Brought], scheme: str
    ) -> None:
        x = prepared.x
        self.channel = channel
        self.rows, self.cols, self.extra = (
            Layout(counts=[getattr(rank, name) for rank in agreed], rank=channel.rank)
            for name in ("rows", "columns", "negatives")
        )
        self.listed = max(rank.listed for rank in agreed)
        self.anywhere_x, self.anywhere_y, self.anywhere_extra, self.anywhere_scalars = (
            any(getattr(rank, f"need_{name}") for rank in agreed)
            for name in ("x", "y", "negatives", "scalars")
        )
        self.grad_wanted = (
            self.anywhere_x or self.anywhere_y or self.anywhere_extra or self.anywhere_scalars
        )
        self.wire = x.dtype
        self.anchor = x.new_zeros((), dtype=torch.float32).requires_grad_(self.grad_wanted)
        memory = min(rank.memory for rank in agreed)
        self.scheme = schemes.chosen(scheme, x, self.rows, self.cols, memory)

    def scalar(self, value: Tensor, reduce: bool) -> Tensor:
        """A scale or bias, whose gradient may be wanted whole on each rank."""
        if not reduce or not self.anywhere_scalars:
            return value
        return SummedGradient.apply(self.channel, self.anchor, value)

    def paired(
        self, job: Any, x: Tensor, y: Tensor, *, cols: Layout, anywhere_y: bool
    ) -> tuple[Tensor, Tensor]:
        needs, scheme = self._way(x, y, cols, anywhere_y)
        return Paired.apply(job, scheme, needs, self.wire, self.anchor, x, y, *job.scalars)

    def known(self, job: Any, x: Tensor, y: Tensor) -> Tensor:
        needs, scheme = self._way(x, y, self.cols, self.anywhere_y)
        return KnownGradient.apply(job, scheme, needs, self.anchor, x, y, *job.scalars)

    def _way(self, x: Tensor, y: Tensor, cols: Layout, anywhere_y: bool) -> tuple[Needs, Any]:
        enabled = torch.is_grad_enabled()
        needs = Needs(
            x=enabled and x.requires_grad, y=enabled and y.requires_grad, anywhere_y=anywhere_y
        )
        kind = schemes.Gather if self.scheme == "gather" else schemes.Circulate
        return needs, kind(self.channel, self.rows, cols)

    def totals(self, x: Tensor, y: Tensor) -> tuple[int, int]:
        return self.rows.total, self.cols.total

    def all_rows(self, own: Tensor) -> Tensor:
        return self.channel.gather(own, self.rows.counts)

    def all_columns(self, own: Tensor) -> Tensor:
        return self.channel.gather(own, self.cols.counts)

    def own_rows(self, values: Tensor) -> Tensor:
        return values[self.rows.own]

    def own_columns(self, values: Tensor) -> Tensor:
        return values[self.cols.own]

    def diagonal(self, x: Tensor, y: Tensor) -> pairs.Pairs:
        if self.rows.counts == self.cols.counts:
            return pairs.diagonal(self.rows.total, self.cols.total, x.device)
        labels = torch.cat(
            [
                torch.arange(count, device=x.device) + self.cols.part(rank).start
                for rank, count in enumerate(self.rows.counts)
            ]
        )
        return pairs.of_labels(labels, self.cols.total)

    def negatives(self, values: Tensor) -> int:
        return self.extra.total if values.dim() == 2 else values.shape[-2]

    def similarity_stats(
        self,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        which: pairs.Pairs,
        *,
        margin: float = 0.0,
        totals: bool = False,
        kept_rows: int = 0,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        job = StatsJob(
            which=which, scalars=(logit_scale,), backend=backend, margin=margin, totals=totals,
            kept_rows=kept_rows, dtype=x.dtype,
        )  # fmt: skip
        return self.paired(job, x, y, cols=self.cols, anywhere_y=self.anywhere_y)

    def extra_stats(
        self, x: Tensor, y: Tensor, logit_scale: Tensor, *, totals: bool, backend: str
    ) -> Tensor:
        job = StatsJob(
            which=pairs.Pairs(), scalars=(logit_scale,), backend=backend, margin=0.0,
            totals=totals, kept_rows=0, dtype=x.dtype,
        )  # fmt: skip
        return self.paired(job, x, y, cols=self.extra, anywhere_y=self.anywhere_extra)[0]

    def listed_dots(self, x: Tensor, y: Tensor, columns: Tensor) -> Tensor:
        filled = columns.new_full((columns.shape[0], self.listed), -1)
        filled[:, : columns.shape[1]] = columns
        job = ListedJob(which=pairs.Pairs(), scalars=(), backend="", columns=self.all_rows(filled))
        rows, _ = self.paired(job, x, y, cols=self.cols, anywhere_y=self.anywhere_y)
        return rows.T[:, : columns.shape[1]]

    def column_sums(self, values: Tensor) -> Tensor:
        return OwnColumns.apply(self.channel, self.cols.counts, values)

    def maximum(self, values: Tensor) -> Tensor:
        own = self.channel.to_owners(values[None], self.cols.counts).amax(0)[0]
        return self.all_columns(own)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks; W times the gradient goes on, see the package's contract."""
        return Weighted.apply(Total.apply(self.channel, values), self.channel.size)

    def reduce(self, losses: Losses, reduction: str) -> Tensor | tuple[Tensor, Tensor]:
        if reduction == "none":
            first, *rest = (Weighted.apply(loss, self.channel.size) for loss, _ in losses)
            return (first, rest[0]) if rest else first
        dtype = statistics_dtype(losses[0][0].device)
        sums = [loss.sum(dtype=dtype) for loss, _ in losses]
        counts = [valid.sum(dtype=dtype) for _, valid in losses]
        found, there = self.total(torch.stack(sums + counts)).chunk(2)
        values = found / there if reduction == "mean" else found
        return values.mean().to(losses[0][0].dtype)
