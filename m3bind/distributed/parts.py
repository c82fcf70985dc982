"""What losses that are not here are made of: log-sum-exps over all ranks, and the mean."""

import torch
from torch import Tensor

from m3bind import backends, ops
from m3bind.distributed import groups
from m3bind.distributed.calls import Call, checked_call, given_names, one_process
from m3bind.distributed.exchange import Channel
from m3bind.distributed.functions import Total, Weighted
from m3bind.distributed.prepared import Prepared
from m3bind.distributed.ranks import meet
from m3bind.dtypes import accumulation_dtype, statistics_dtype
from m3bind.eager import eager
from m3bind.ops import arguments
from m3bind.ops.contrastive import Terms
from m3bind.ops.pairs import Pairs

OP = "similarity_lse"


def similarity_lse(
    x: Tensor,  # [n, D], this rank's
    y: Tensor,  # [m, D]
    logit_scale: Tensor | float,  # [] or [1]
    *,
    row_ids: Tensor | None = None,  # [n] int64
    col_ids: Tensor | None = None,  # [m] int64
    backend: str | None = None,
    group: groups.Group = None,
    scheme: str = "auto",
    sizes: str = "exchange",
    check: bool = False,
) -> tuple[Tensor, Tensor]:  # [n], [m]
    """`m3bind.similarity_lse` of this rank's rows over the columns of all ranks, and of its columns
    over all rows.

    Gradients are those of the sum of what all ranks call `backward` on, not W times that: `mean`
    of what is made of them puts the factor in.

    Raises:
        ValueError, RuntimeError: as `m3bind.distributed.clip_loss`.
    """
    call = checked_call(OP, {"x": x, "y": y}, group, scheme, sizes)
    if call.channel is None:
        x, y = call.features
        return ops.similarity_lse(
            x, y, logit_scale, row_ids=row_ids, col_ids=col_ids, backend=backend
        )
    return _over_ranks(call, logit_scale, row_ids, col_ids, backend, scheme, sizes, check)


@eager
def _over_ranks(
    call: Call,
    logit_scale: Tensor | float,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    backend: str | None,
    scheme: str,
    sizes: str,
    check: bool,
) -> tuple[Tensor, Tensor]:
    ids = None
    if row_ids is not None or col_ids is not None:
        ids = (row_ids, col_ids)

    def prepare() -> Prepared:
        own_x, own_y = arguments.features(OP, *call.own())
        groups.refuse_sharded(OP, {"row_ids": row_ids, "col_ids": col_ids})
        terms = Terms.checked(
            OP, own_x, own_y, None, bias=None, labels=None, positive_ids=None,
            mask_ids=ids,  # type: ignore[arg-type]  # None within is refused
        )  # fmt: skip
        chosen = backends.resolve(OP, own_x.device.type, own_x.dtype, backend)
        one_process(OP, chosen)
        scale = groups.scalar(OP, "logit_scale", logit_scale, own_x)
        return Prepared(
            x=own_x, y=own_y, scale=scale, terms=terms, backend=chosen,
            given={"logit_scale": logit_scale},
        )  # fmt: skip

    own, ranks = meet(
        OP, call, prepare, given_names({"ids": ids}), diagonal=False, scheme=scheme,
        sizes=sizes, check=check,
    )  # fmt: skip
    with arguments.without_autocast(own.x):
        which = own.terms.pairs(own.x, own.y, ranks, Pairs())
        rows, cols = ranks.similarity_stats(own.x, own.y, own.scale, which, backend=own.backend)
        acc = accumulation_dtype(own.x.dtype)
        return rows[0].to(acc), cols[0].to(acc)


def mean(
    values: Tensor,  # [n, ...], this rank's
    group: groups.Group = None,
) -> Tensor:  # []
    """The mean over the values of all ranks, whose gradient is W times this rank's share of it.

    Equivalent to::

        total = torch.distributed.nn.all_reduce(torch.stack([values.sum(), values.numel()]))
        return total[0] / total[1]
    """
    groups.refuse_sharded("mean", {"values": values})
    channel = groups.channel_of(group)
    if channel is None:
        return values.mean()
    return _mean(values, channel)


@eager
def _mean(values: Tensor, channel: Channel) -> Tensor:
    dtype = statistics_dtype(values.device)
    own = values.sum(dtype=dtype)
    total, count = Total.apply(channel, torch.stack([own, torch.full_like(own, values.numel())]))
    return Weighted.apply(total / count, channel.size).to(values.dtype)


def first_column(count: int, group: groups.Group = None) -> int:
    """How many columns the ranks before this one have, which each say their own `count`."""
    channel = groups.channel_of(group)
    if channel is None:
        return 0
    return sum(other for (other,) in channel.numbers([count])[: channel.rank])
