"""clip_loss: symmetric InfoNCE, the loss of CLIP, with what its descendants added."""

from torch import Tensor

from m3bind import backends, reference
from m3bind.ops import arguments
from m3bind.ops.contrastive import DIRECTIONS, REDUCTIONS, Ids, Terms, composed
from m3bind.ops.info_nce import info_nce
from m3bind.ops.info_nce_rows import info_nce_rows
from m3bind.ops.ranks import ONE_RANK
from m3bind.ops.stats import rows_to_keep


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
    memory_budget: float | None = None,
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
            weights of at least 0, which each direction scales to a sum of 1; no gradient to them.
        label_smoothing: the part of the target that is spread over all columns in the denominator.
        z_loss: adds `z_loss * logsumexp(logits) ** 2`, per direction.
        margin: lowers the cosine of the positives: logit_scale * (cos - margin).
        directions: "both" (their mean), "rows" (x looks for y) or "columns".
        reduction: "mean" over the rows, and over the columns, that have a positive; "sum"; "none":
            (rows [N], columns [M]), or the one that `directions` names, 0 where there is no
            positive. Nothing to average has the mean NaN and the sum 0, as in torch.
        memory_budget: MiB in which the forward pass may leave dot products of x and y for the
            backward pass, which forms the others again; N * M * 4 bytes hold all of them, and save
            one of four matrix products. Default: 64, which holds those of batches up to 4096, and a
            quarter of 8192's. A single direction has three anyway, where it is plain and
            the backend "cpp". Results differ by no more than the order of sums.
            Backends "triton" and "cuda" (default: 0) keep exp(logit), in 2.3 bytes a pair of
            16-bit features and 4.3 of float32, of tiles without positives and masked pairs;
            nothing where D <= 256, where N * M <= 2**20 in 16 bit, or with label_smoothing. Each
            is rounded as the derivatives themselves are, to 11 binary digits in 16 bit; sums that
            are left beside them keep that out of the gradients. "reference" keeps everything.
        backend: a name from `m3bind.backends.BACKENDS`; default: see `m3bind.backends`.

    Returns:
        float32 (float64 for float64 features). Second derivatives: backend="reference" only.

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
    label_smoothing = arguments.number(op, "label_smoothing", label_smoothing, 0.0, 1.0)
    z_loss = arguments.number(op, "z_loss", z_loss, 0.0)
    margin = arguments.number(op, "margin", margin)
    if memory_budget is not None:
        memory_budget = arguments.number(op, "memory_budget", memory_budget, 0.0)
    extras = (logit_bias, labels, positive_ids, mask_ids, negatives, soft_targets)
    plain = all(extra is None for extra in extras) and not label_smoothing and not z_loss
    plain = plain and reduction != "none"
    if labels is None and positive_ids is None and soft_targets is None:
        arguments.paired(op, x, y)
    terms = None
    if not plain:
        terms = Terms.checked(
            op, x, y, y.shape[0], bias=logit_bias, labels=labels, positive_ids=positive_ids,
            mask_ids=mask_ids, negatives=negatives, soft_targets=soft_targets,
            label_smoothing=label_smoothing, z_loss=z_loss, margin=margin, directions=directions,
            reduction=reduction,
        )  # fmt: skip
    chosen = backends.resolve(op, x.device.type, x.dtype, backend)
    with arguments.without_autocast(x):
        if chosen == "reference":
            return reference.clip_loss(
                x, y, scale, margin=margin, directions=directions, reduction=reduction,
                **({} if terms is None else terms.features()),
            )  # fmt: skip
        # Columns beyond the rows have no loss, but their NaN reaches what they stand beside.
        one_way = directions == "rows" or (directions == "columns" and x.shape[0] == y.shape[0])
        one_way = one_way and plain and backends.one_way("similarity_stats", chosen)
        if one_way and arguments.gradient_wanted(x, y, scale):
            x, y = (x, y) if directions == "rows" else (y, x)
            return info_nce_rows(
                x, y, scale, margin=margin, mean=reduction == "mean", backend=chosen
            )
        if not arguments.gradient_wanted(x, y, scale):
            memory_budget = 0.0
        if plain and directions == "both":
            kept_rows = rows_to_keep(x, y.shape[0], memory_budget, False, chosen)
            return info_nce(
                x, y, scale, margin=margin, mean=reduction == "mean", kept_rows=kept_rows,
                backend=chosen,
            )  # fmt: skip
        if terms is None:
            terms = Terms(margin=margin, directions=directions, reduction=reduction)
        return composed(x, y, scale, terms, ONE_RANK, memory_budget, chosen)
