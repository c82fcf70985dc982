"""clip_loss of a batch over ranks."""

from typing import Any

from torch import Tensor

from m3bind import backends, ops
from m3bind.distributed import groups
from m3bind.distributed.calls import Call, checked_call, given_names, one_process
from m3bind.distributed.prepared import Prepared
from m3bind.distributed.ranks import meet
from m3bind.eager import eager
from m3bind.ops import arguments
from m3bind.ops.contrastive import DIRECTIONS, REDUCTIONS, Ids, Terms, composed

OP = "clip_loss"


def clip_loss(
    x: Tensor,  # [n, D], this rank's
    y: Tensor,  # [m, D]
    logit_scale: Tensor | float,  # [] or [1]
    *,
    logit_bias: Tensor | float | None = None,  # [] or [1]
    labels: Tensor | None = None,  # [n] int64, columns of all ranks
    positive_ids: Ids | None = None,  # [n], [m] int64
    mask_ids: Ids | None = None,  # [n], [m] int64
    negatives: Tensor | None = None,  # [K, D] or [n, K, D]
    soft_targets: tuple[Tensor, Tensor] | None = None,  # [n, K] int64, columns of all ranks; [n, K]
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    margin: float = 0.0,
    directions: str = "both",
    reduction: str = "mean",
    memory_budget: float | None = None,
    backend: str | None = None,
    group: groups.Group = None,
    scheme: str = "auto",
    sizes: str = "exchange",
    check: bool = False,
    reduce_scale: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`m3bind.clip_loss` of the batch that all ranks of a group hold together.

    Equivalent to::

        x, y = (torch.cat(torch.distributed.nn.all_gather(t)) for t in (x, y))
        return m3bind.clip_loss(x, y, logit_scale)  # on one rank's gradients: see the package

    Args:
        x, y: this rank's rows; other ranks may have other numbers of them, or none.
        labels, soft_targets: columns are counted over all ranks, in the order of the ranks.
        positive_ids, mask_ids: mean the same on every rank. Default of all: row i of a rank and
            its own column i are positive.
        negatives: [K, D] are this rank's part of what all rows of all ranks compete with (a queue
            that every rank holds is passed as `queue.chunk(W)[rank]`); [n, K, D]: its own rows'.
        directions: one costs as much as both. Its three matrix products of one process would need
            that unfinished gradients travel in the forward pass, which takes longer.
        reduction: "mean" and "sum" over all ranks; "none": of this rank's rows and columns.
        memory_budget: MiB of this rank.
        group, scheme, sizes, check, reduce_scale: see `m3bind.distributed`.

    Others, dtypes and what is returned: see `m3bind.clip_loss`.

    Raises:
        ValueError: what `m3bind.clip_loss` raises, on all ranks if on any; ranks that differ in
            what must be equal; backend="reference", which would hold the whole matrix.
        RuntimeError: a rank was lost.
    """
    given: dict[str, Any] = {
        "logit_bias": logit_bias, "labels": labels, "positive_ids": positive_ids,
        "mask_ids": mask_ids, "negatives": negatives, "soft_targets": soft_targets,
        "label_smoothing": label_smoothing, "z_loss": z_loss, "margin": margin,
        "directions": directions, "reduction": reduction, "memory_budget": memory_budget,
        "backend": backend,
    }  # fmt: skip
    call = checked_call(OP, {"x": x, "y": y}, group, scheme, sizes)
    if call.channel is None:
        x, y = call.features
        return ops.clip_loss(x, y, logit_scale, **given)
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
    logit_bias: Tensor | float | None,
    memory_budget: float | None,
    backend: str | None,
    **given: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    def prepare() -> Prepared:
        own_x, own_y = arguments.features(OP, *call.own())
        groups.refuse_sharded(OP, given)
        arguments.choice(OP, "reduction", given["reduction"], REDUCTIONS)
        arguments.choice(OP, "directions", given["directions"], DIRECTIONS)
        scale = groups.scalar(OP, "logit_scale", logit_scale, own_x)
        if memory_budget is not None:
            arguments.number(OP, "memory_budget", memory_budget, 0.0)
        arguments.number(OP, "label_smoothing", given["label_smoothing"], 0.0, 1.0)
        arguments.number(OP, "z_loss", given["z_loss"], 0.0)
        arguments.number(OP, "margin", given["margin"])
        if logit_bias is not None:
            groups.scalar(OP, "logit_bias", logit_bias, own_x)
        terms = Terms.checked(OP, own_x, own_y, None, bias=logit_bias, **given)
        chosen = backends.resolve(OP, own_x.device.type, own_x.dtype, backend)
        one_process(OP, chosen)
        numbers = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        return Prepared(x=own_x, y=own_y, scale=scale, terms=terms, backend=chosen, given=numbers)

    aims = ("labels", "positive_ids", "soft_targets")
    features = ("mask_ids", "negatives", *aims)
    options = {name: value for name, value in given.items() if name not in features}
    options |= given_names({name: given[name] for name in features} | {"logit_bias": logit_bias})
    options |= {"reduce_scale": reduce_scale, "check": check}
    if isinstance(given["negatives"], Tensor):
        options["dimensions of negatives"] = str(given["negatives"].dim())
    diagonal = all(given[name] is None for name in aims)
    prepared, ranks = meet(
        OP, call, prepare, options, diagonal=diagonal, scheme=scheme, sizes=sizes, check=check
    )
    terms = prepared.terms
    with arguments.without_autocast(prepared.x):
        scale = ranks.scalar(prepared.scale, reduce_scale)
        if terms.bias is not None:
            terms.bias = ranks.scalar(terms.bias, reduce_scale)
        if sizes == "static":
            terms.check_columns(OP, ranks.cols.total)
        budget = memory_budget if ranks.grad_wanted else 0.0
        return composed(prepared.x, prepared.y, scale, terms, ranks, budget, prepared.backend)
