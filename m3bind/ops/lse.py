"""similarity_lse: row and column log-sum-exp of a similarity matrix that is never materialised."""

from torch import Tensor

from m3bind import backends, reference
from m3bind.dtypes import accumulation_dtype
from m3bind.ops import arguments
from m3bind.ops.pairs import Pairs
from m3bind.ops.stats import similarity_stats


def similarity_lse(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # [] or [1]
    *,
    row_ids: Tensor | None = None,  # [N] int64
    col_ids: Tensor | None = None,  # [M] int64
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [N], [M]
    """Row and column log-sum-exp of scaled similarities, in O(N + M) memory.

    Equivalent to::

        s = (logit_scale * x @ y.T).masked_fill(row_ids[:, None] == col_ids, -inf)
        return s.logsumexp(1), s.logsumexp(0)

    The building block for contrastive losses that are not here.

    Args:
        x, y: float32, bfloat16, float16 (logits are formed in float32) or float64.
        logit_scale: the factor itself, not its logarithm; differentiable.
        row_ids, col_ids: both or none; pairs with equal ids are left out.
        backend: a name from `m3bind.backends.BACKENDS`; default: see `m3bind.backends`.

    Returns:
        float32 (float64 for float64 features); -inf where nothing is left to sum. Second
        derivatives: backend="reference" only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown or unavailable backend.
    """
    op = "similarity_lse"
    x, y = arguments.features(op, x, y)
    scale = arguments.scalar(op, "logit_scale", logit_scale, x)
    if (row_ids is None) != (col_ids is None):
        raise ValueError(f"{op}: pass both row_ids and col_ids, or neither")
    if row_ids is not None and col_ids is not None:
        row_ids = arguments.ids(op, "row_ids", row_ids, x)
        col_ids = arguments.ids(op, "col_ids", col_ids, y)
    chosen = backends.resolve(op, x.device.type, x.dtype, backend)
    with arguments.without_autocast(x):
        if chosen == "reference":
            return reference.similarity_lse(x, y, scale, row_ids, col_ids)
        which = Pairs()
        if row_ids is not None and col_ids is not None:
            which = which.masked_by(row_ids, col_ids)
        rows, cols = similarity_stats(x, y, scale, which, backend=chosen)
        acc = accumulation_dtype(x.dtype)
        return rows[0].to(acc), cols[0].to(acc)
