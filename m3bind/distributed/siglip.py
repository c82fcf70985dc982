"""siglip_loss of a batch over ranks."""

from typing import Any

import torch
from torch import Tensor

from m3bind import backends, ops
from m3bind.distributed import groups
from m3bind.distributed.calls import Call, checked_call, given_names, one_process
from m3bind.distributed.jobs import SigmoidJob, SigmoidTotalJob
from m3bind.distributed.prepared import Prepared
from m3bind.distributed.ranks import meet
from m3bind.dtypes import accumulation_dtype
from m3bind.eager import eager
from m3bind.ops import arguments
from m3bind.ops.contrastive import REDUCTIONS, Ids, Terms

OP = "siglip_loss"


def siglip_loss(
    x: Tensor,  # [n, D], this rank's
    y: Tensor,  # [m, D]
    logit_scale: Tensor | float,  # [] or [1]
    logit_bias: Tensor | float | None = None,  # [] or [1]
    *,
    labels: Tensor | None = None,  # [n] int64, columns of all ranks
    positive_ids: Ids | None = None,  # [n], [m] int64
    mask_ids: Ids | None = None,  # [n], [m] int64
    reduction: str = "mean",
    backend: str | None = None,
    group: groups.Group = None,
    scheme: str = "auto",
    sizes: str = "exchange",
    check: bool = False,
    reduce_scale: bool = False,
) -> Tensor:
    """`m3bind.siglip_loss` of the batch that all ranks of a group hold together.

    Equivalent to::

        x, y = (torch.cat(torch.distributed.nn.all_gather(t)) for t in (x, y))
        return m3bind.siglip_loss(x, y, logit_scale, logit_bias)

    A mean or a sum has no normaliser to wait for: its gradient is formed in the forward pass, and
    nothing travels in the backward pass. Gathering takes 4 matrix products a rank then, circulating
    3; "none" takes 5 and 4.

    Args:
        x, y: this rank's rows; other ranks may have other numbers of them, or none.
        labels: columns are counted over all ranks. Default: row i of a rank and its own column i.
        reduction: "mean" divides by the rows of all ranks; "none": of this rank's rows.
        group, scheme, sizes, check, reduce_scale: see `m3bind.distributed`.

    Others, dtypes and what is returned: see `m3bind.siglip_loss`.

    Raises:
        ValueError, RuntimeError: as `m3bind.distributed.clip_loss`.
    """
    given: dict[str, Any] = {
        "logit_bias": logit_bias, "labels": labels, "positive_ids": positive_ids,
        "mask_ids": mask_ids, "reduction": reduction, "backend": backend,
    }  # fmt: skip
    call = checked_call(OP, {"x": x, "y": y}, group, scheme, sizes)
    if call.channel is None:
        x, y = call.features
        return ops.siglip_loss(x, y, logit_scale, **given)
    return _over_ranks(call, logit_scale, scheme, sizes, check, reduce_scale, **given)


@eager
def _over_ranks(
    call: Call,
    logit_scale: Tensor | float,
    scheme: str,
    sizes: str,
    check: bool,
    reduce_scale: bool,
    *,
    reduction: str,
    backend: str | None,
    logit_bias: Tensor | float | None,
    **which: Any,
) -> Tensor:
    def prepare() -> Prepared:
        own_x, own_y = arguments.features(OP, *call.own())
        groups.refuse_sharded(OP, which)
        arguments.choice(OP, "reduction", reduction, REDUCTIONS)
        scale = groups.scalar(OP, "logit_scale", logit_scale, own_x)
        bias = groups.scalar(OP, "logit_bias", 0.0 if logit_bias is None else logit_bias, own_x)
        terms = Terms.checked(OP, own_x, own_y, None, bias=bias, **which)
        chosen = backends.resolve(OP, own_x.device.type, own_x.dtype, backend)
        one_process(OP, chosen)
        numbers = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        return Prepared(x=own_x, y=own_y, scale=scale, terms=terms, backend=chosen, given=numbers)

    options = {"reduction": reduction, "reduce_scale": reduce_scale, "check": check}
    options |= given_names(which | {"logit_bias": logit_bias})
    diagonal = which["labels"] is None and which["positive_ids"] is None
    own, ranks = meet(
        OP, call, prepare, options, diagonal=diagonal, scheme=scheme, sizes=sizes, check=check
    )
    terms = own.terms
    with arguments.without_autocast(own.x):
        scale = ranks.scalar(own.scale, reduce_scale)
        assert terms.bias is not None
        bias = ranks.scalar(terms.bias, reduce_scale)
        if sizes == "static":
            terms.check_columns(OP, ranks.cols.total)
        pairs = terms.pairs(own.x, own.y, ranks)
        known = reduction != "none" and ranks.grad_wanted
        job = (SigmoidTotalJob if known else SigmoidJob)(
            which=pairs, scalars=(scale, bias), backend=own.backend
        )
        acc = accumulation_dtype(own.x.dtype)
        if known:
            losses = ranks.known(job, own.x, own.y)
        else:
            rows, _ = ranks.paired(job, own.x, own.y, cols=ranks.cols, anywhere_y=ranks.anywhere_y)
            losses = rows[0]
        valid = torch.ones_like(own.x[:, 0], dtype=torch.bool)
        found = ranks.reduce([(losses, valid)], reduction)
        assert isinstance(found, Tensor)
        return found.to(acc)
