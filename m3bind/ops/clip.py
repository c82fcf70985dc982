"""clip_loss: symmetric InfoNCE, the loss of CLIP, with what its descendants added."""

import torch
from torch import Tensor

from m3bind import backends, reference
from m3bind.dtypes import accumulation_dtype
from m3bind.ops import arguments, pairs, soft
from m3bind.ops.direction import Side, direction_loss
from m3bind.ops.info_nce import info_nce
from m3bind.ops.info_nce_rows import info_nce_rows
from m3bind.ops.lse import similarity_lse
from m3bind.ops.stats import rows_to_keep, similarity_stats
from m3bind.reference import reduce

REDUCTIONS = ("mean", "sum", "none")
DIRECTIONS = ("both", "rows", "columns")

Ids = Tensor | tuple[Tensor, Tensor]


def clip_loss(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # [] or [1]
    *,
    logit_bias: Tensor | float | None = None,  # [] or [1]
    labels: Tensor | None = None,  # [N] int64
    positive_ids: Ids | None = None,  # [N], [M] int64
    mask_ids: Ids | None = None,  # [N], [M] int64
    negatives: Tensor | None = None,  # [K, D] or [N, K, D]
    soft_targets: tuple[Tensor, Tensor] | None = None,  # [N, K] int64, [N, K]
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    margin: float = 0.0,
    directions: str = "both",
    reduction: str = "mean",
    memory_budget: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Symmetric InfoNCE without the N x M matrix of logits in memory.

    Equivalent to::

        logits = logit_scale * x @ y.T + logit_bias
        labels = torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        x, y: features, usually of unit norm; float32, bfloat16, float16 (logits are formed in
            float32) or float64. Under autocast they are cast, the scale is not.
        logit_scale: the factor itself, not its logarithm; its gradient is exact.
        logit_bias: cancels in both softmaxes: only `z_loss` sees it.
        labels: the column of each row's positive; below 0 (-100): the row is ignored. Columns
            without a positive leave the columns' mean. Default: row i and column i, where M >= N.
        positive_ids: ids of rows and of columns (one tensor, where they are the same): equal ids
            are positives, and a row's loss is the mean of -log p over its positives.
        mask_ids: pairs with equal ids leave the denominator, unless they are positive: duplicates,
            other samples of the same patient, a row against itself.
        negatives: further columns for the rows' direction alone, the same for all rows or K a row.
        soft_targets: the columns that each row aims at, distinct (below 0: none), and their
            weights, which each direction scales to a sum of 1. No gradient to the weights.
        label_smoothing: the part of the target that is spread over all columns in the denominator.
        z_loss: adds `z_loss * logsumexp(logits) ** 2`, per direction.
        margin: lowers the cosine of the positives: logit_scale * (cos - margin).
        directions: "both" (their mean), "rows" (x looks for y) or "columns".
        reduction: "mean" over the rows, and over the columns, that have a positive; "sum"; "none":
            (rows [N], columns [M]), or the one that `directions` names, 0 where there is no
            positive. Nothing to average has the mean NaN and the sum 0, as in torch.
        memory_budget: MiB in which the forward pass may leave dot products of x and y for the
            backward pass, which forms the others again; N * M * 4 bytes hold all of them, and save
            one of four matrix products. A single direction has three anyway, where it is plain and
            the backend "cpp". Results differ by no more than the order of sums. Not with
            `backend="triton"`, which keeps nothing, and "reference", which keeps everything.
        backend: a name from `m3bind.backends.BACKENDS`; default: the fastest that can run.

    Returns:
        float32 (float64 for float64 features). Double backward: backend="reference" only.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, an unknown or unavailable
            backend.

    Source: Radford et al. 2021, arXiv:2103.00020; labels: Yang et al. 2022, arXiv:2204.03610;
    several positives: Khosla et al. 2020, arXiv:2004.11362.
    """
    op = "clip_loss"
    x, y = arguments.features(op, x, y)
    arguments.choice(op, "reduction", reduction, REDUCTIONS)
    arguments.choice(op, "directions", directions, DIRECTIONS)
    scale = arguments.scalar(op, "logit_scale", logit_scale, x)
    bias = None if logit_bias is None else arguments.scalar(op, "logit_bias", logit_bias, x)
    label_smoothing = arguments.number(op, "label_smoothing", label_smoothing, 0.0, 1.0)
    z_loss = arguments.number(op, "z_loss", z_loss, 0.0)
    margin = arguments.number(op, "margin", margin)
    memory_budget = arguments.number(op, "memory_budget", memory_budget, 0.0)
    arguments.one_of(op, labels=labels, positive_ids=positive_ids, soft_targets=soft_targets)
    if labels is not None:
        labels = arguments.labels(op, labels, x, y)
    if positive_ids is not None:
        positive_ids = arguments.id_pair(op, "positive_ids", positive_ids, x, y)
    if mask_ids is not None:
        mask_ids = arguments.id_pair(op, "mask_ids", mask_ids, x, y)
    if negatives is not None:
        negatives = arguments.negatives(op, negatives, x)
    if soft_targets is not None:
        soft_targets = arguments.soft_targets(op, soft_targets, x, y)
        if margin:
            raise ValueError(
                f"{op}: margin={margin} with soft_targets: a margin needs positives; pass labels "
                "or positive_ids, or margin=0"
            )
    elif labels is None and positive_ids is None and x.shape[0] > y.shape[0]:
        raise ValueError(
            f"{op}: x has {x.shape[0]} rows, y has {y.shape[0]}: row i of x belongs to row i of y, "
            "so rows are left over; pass labels or positive_ids, or swap x and y"
        )
    extras = (bias, labels, positive_ids, mask_ids, negatives, soft_targets)
    plain = all(extra is None for extra in extras) and not label_smoothing and not z_loss
    plain = plain and reduction != "none"
    chosen = backends.resolve(op, x.device.type, x.dtype, backend)
    with arguments.without_autocast(x):
        if chosen == "reference":
            return reference.clip_loss(
                x, y, scale, logit_bias=bias, labels=labels, positive_ids=positive_ids,
                mask_ids=mask_ids, negatives=negatives, soft_targets=soft_targets,
                label_smoothing=label_smoothing, z_loss=z_loss, margin=margin,
                directions=directions, reduction=reduction,
            )  # fmt: skip
        # Columns beyond the rows have no loss, but their NaN reaches what they stand beside.
        one_way = directions == "rows" or (directions == "columns" and x.shape[0] == y.shape[0])
        one_way = one_way and plain and backends.one_way("similarity_stats", chosen)
        if one_way and arguments.gradient_wanted(x, y, scale):
            x, y = (x, y) if directions == "rows" else (y, x)
            return info_nce_rows(
                x, y, scale, margin=margin, mean=reduction == "mean", backend=chosen
            )
        kept_rows = 0
        if memory_budget and arguments.gradient_wanted(x, y, scale):
            kept_rows = rows_to_keep(x, y, memory_budget, chosen)
        if plain and directions == "both":
            return info_nce(
                x, y, scale, margin=margin, mean=reduction == "mean", kept_rows=kept_rows,
                backend=chosen,
            )  # fmt: skip
        acc = accumulation_dtype(x.dtype)
        if negatives is not None or soft_targets is not None:
            # Several gradients meet in x and y: each on its own would be rounded to 16 bit.
            x, y = x.to(acc), y.to(acc)
        if soft_targets is not None:
            which = pairs.Pairs()
        elif positive_ids is not None:
            which = pairs.of_ids(*positive_ids)
        elif labels is not None:
            which = pairs.of_labels(labels, y.shape[0])
        else:
            which = pairs.diagonal(x.shape[0], y.shape[0], x.device)
        if mask_ids is not None:
            which = which.masked_by(*mask_ids)
        rows, cols = similarity_stats(
            x, y, scale, which, margin=margin, totals=label_smoothing > 0, kept_rows=kept_rows,
            backend=chosen,
        )  # fmt: skip
        unmasked = which.unmasked(x.shape[0], y.shape[0]) if label_smoothing else (1, 1)
        row_side, col_side = (
            Side(lse=stats[0], target=stats[1], total=stats[2], positives=count, unmasked=left)
            for stats, count, left in zip(
                (rows, cols), (which.row_positives, which.col_positives), unmasked, strict=True
            )
        )
        if soft_targets is not None:
            soft.add_targets(row_side, col_side, x, y, scale, *soft_targets, which)
        if negatives is not None:
            _add_negatives(row_side, x, scale, negatives.to(acc), chosen)
        sides = {"rows": (row_side,), "columns": (col_side,), "both": (row_side, col_side)}
        losses = [
            direction_loss(side, bias, label_smoothing, z_loss, acc) for side in sides[directions]
        ]
        return reduce(losses, reduction)


def _add_negatives(rows: Side, x: Tensor, scale: Tensor, negatives: Tensor, backend: str) -> None:
    """Further columns of the rows' denominator."""
    if negatives.dim() == 2:
        lse, _ = similarity_lse(x, negatives, scale, backend=backend)
        total = scale * (x @ negatives.sum(0))
    else:
        logits = scale * torch.einsum("nd,nkd->nk", x, negatives)
        lse, total = logits.logsumexp(1), logits.sum(1)
    rows.lse = torch.logaddexp(rows.lse, lse.to(rows.lse.dtype))
    rows.total = rows.total + total
    rows.unmasked = rows.unmasked + negatives.shape[-2]
