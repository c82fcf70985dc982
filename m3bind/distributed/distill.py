"""similarity_distill of a batch over ranks."""

from typing import Any

import torch
from torch import Tensor

from m3bind import backends, ops
from m3bind.distributed import groups
from m3bind.distributed.calls import Call, checked_call, given_names, one_process
from m3bind.distributed.jobs import DistillJob
from m3bind.distributed.prepared import Prepared
from m3bind.distributed.ranks import meet
from m3bind.dtypes import accumulation_dtype
from m3bind.eager import eager
from m3bind.ops import arguments
from m3bind.ops.contrastive import DIRECTIONS, REDUCTIONS, Ids, Terms
from m3bind.ops.distill import KINDS, composed, rows_to_keep
from m3bind.ops.pairs import Pairs

OP = "similarity_distill"


def similarity_distill(
    x: Tensor,  # [n, D], this rank's
    y: Tensor,  # [m, D]
    logit_scale: Tensor | float,  # [] or [1]
    teacher_x: Tensor,  # [n, E]
    teacher_y: Tensor,  # [m, E]
    teacher_scale: Tensor | float,  # [] or [1]
    *,
    kind: str = "kl",
    mask_ids: Ids | None = None,  # [n], [m] int64
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
    """`m3bind.similarity_distill` of the batch that all ranks of a group hold together.

    Equivalent to::

        x, y, teacher_x, teacher_y = (
            torch.cat(torch.distributed.nn.all_gather(t)) for t in (x, y, teacher_x, teacher_y)
        )
        return m3bind.similarity_distill(x, y, logit_scale, teacher_x, teacher_y, teacher_scale)

    The teacher's features travel as the student's do. Gathering takes 8 matrix products a rank,
    circulating 6; two fewer, where all dot products are kept.

    Args:
        x, y, teacher_x, teacher_y: this rank's rows; other ranks may have other numbers of them.
        mask_ids: mean the same on every rank.
        reduction: "mean" and "sum" over all ranks; "none": of this rank's rows and columns.
        memory_budget: MiB of this rank.
        group, scheme, sizes, check, reduce_scale: see `m3bind.distributed`.

    Others, dtypes and what is returned: see `m3bind.similarity_distill`.

    Raises:
        ValueError, RuntimeError: as `m3bind.distributed.clip_loss`.
    """
    given: dict[str, Any] = {
        "kind": kind, "mask_ids": mask_ids, "directions": directions, "reduction": reduction,
        "memory_budget": memory_budget, "backend": backend,
    }  # fmt: skip
    features = {"x": x, "y": y, "teacher_x": teacher_x, "teacher_y": teacher_y}
    call = checked_call(OP, features, group, scheme, sizes)
    if call.channel is None:
        x, y, teacher_x, teacher_y = call.features
        return ops.similarity_distill(
            x, y, logit_scale, teacher_x, teacher_y, teacher_scale, **given
        )
    return _over_ranks(
        call, logit_scale, teacher_scale, scheme, sizes, check, reduce_scale, **given
    )


@eager
def _over_ranks(
    call: Call,
    logit_scale: Tensor | float,
    teacher_scale: Tensor | float,
    scheme: str,
    sizes: str,
    check: bool,
    reduce_scale: bool,
    *,
    kind: str,
    mask_ids: Ids | None,
    directions: str,
    reduction: str,
    memory_budget: float | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    def prepare() -> Prepared:
        *student, teacher_x, teacher_y = call.own()
        x, y = arguments.features(OP, *student)
        groups.refuse_sharded(OP, {"mask_ids": mask_ids})
        teacher_x, teacher_y = arguments.features(
            OP, teacher_x, teacher_y, names=("teacher_x", "teacher_y")
        )
        arguments.same_rows(OP, "teacher_x", teacher_x, "x", x)
        arguments.same_rows(OP, "teacher_y", teacher_y, "y", y)
        arguments.choice(OP, "kind", kind, KINDS)
        arguments.choice(OP, "directions", directions, DIRECTIONS)
        arguments.choice(OP, "reduction", reduction, REDUCTIONS)
        if memory_budget is not None:
            arguments.number(OP, "memory_budget", memory_budget, 0.0)
        wide = teacher_x if teacher_x.dtype == torch.float64 else x
        terms = Terms.checked(
            OP, x, y, None, bias=None, labels=None, positive_ids=None, mask_ids=mask_ids
        )
        chosen = backends.resolve(OP, x.device.type, wide.dtype, backend)
        one_process(OP, chosen)
        return Prepared(
            x=x, y=y, scale=groups.scalar(OP, "logit_scale", logit_scale, wide), terms=terms,
            backend=chosen, teacher=(teacher_x.detach(), teacher_y.detach()),
            teacher_scale=groups.scalar(OP, "teacher_scale", teacher_scale, wide).detach(),
            given={"logit_scale": logit_scale, "teacher_scale": teacher_scale},
        )  # fmt: skip

    options = {
        "kind": kind, "directions": directions, "reduction": reduction,
        "reduce_scale": reduce_scale, "check": check, **given_names({"mask_ids": mask_ids}),
    }  # fmt: skip
    own, ranks = meet(
        OP, call, prepare, options, diagonal=False, scheme=scheme, sizes=sizes, check=check
    )
    x, y = own.x, own.y
    assert own.teacher is not None and own.teacher_scale is not None
    with arguments.without_autocast(x):
        scale = ranks.scalar(own.scale, reduce_scale)
        which = Pairs() if mask_ids is None else own.terms.pairs(x, y, ranks, Pairs())
        job = DistillJob(
            which=which, scalars=(scale,), backend=own.backend, more_x=own.teacher[:1],
            more_y=own.teacher[1:], teacher_scale=own.teacher_scale, kl=kind == "kl",
            kept_rows=rows_to_keep(
                x, ranks.cols.total, scale.dtype, memory_budget if ranks.grad_wanted else 0.0,
                own.backend,
            ),
        )  # fmt: skip
        rows, cols = ranks.paired(job, x, y, cols=ranks.cols, anywhere_y=ranks.anywhere_y)
        acc = accumulation_dtype(scale.dtype)
        losses = {"rows": rows[0].to(acc), "columns": cols[0].to(acc)}
        wanted = tuple(losses) if directions == "both" else (directions,)
        return composed(losses, wanted, which, x, y, ranks, reduction)
