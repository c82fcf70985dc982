"""Soft targets: a few weighted columns a row, in O(N * K * D) time and O(N * K) memory."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind.ops.direction import Side, add_exponentials
from m3bind.ops.pairs import Pairs

if TYPE_CHECKING:
    from m3bind.ops.ranks import Ranks


def _first_of_equal(columns: Tensor) -> Tensor:  # [N, K] bool
    """Whether nothing before it in its row is equal: a column enters a denominator once."""
    ordered, order = columns.sort(dim=1, stable=True)
    new = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    return torch.empty_like(new).scatter(1, order, new)


def add_targets(
    rows: Side,
    cols: Side,
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    scale: Tensor,  # []
    columns: Tensor,  # [N, K], below 0: no target
    weights: Tensor,  # [N, K]
    which: Pairs,
    ranks: "Ranks",
) -> None:
    """Puts the targets into both sides, and into the denominators where a mask took them out."""
    stats = rows.lse.dtype
    num_cols = ranks.totals(x, y)[1]
    if num_cols == 0:  # no tensor of them can be indexed, not even by a column that does not count
        columns, weights = columns[:, :0], weights[:, :0]
    there = (columns >= 0) & ~(weights <= 0)  # NaN goes on, into the loss
    at = columns.clamp(min=0)
    logits = scale.to(stats) * ranks.listed_dots(x, y, at).to(stats)
    weights = weights.to(stats).where(there, 0)
    flat = at.flatten()

    def by_column(values: Tensor) -> Tensor:
        own = values.new_zeros(num_cols).index_add(0, flat, values.flatten())
        return ranks.column_sums(own)

    for side, total, aimed in (
        (rows, weights.sum(1), (weights * logits).sum(1)),
        (cols, by_column(weights), by_column(weights * logits)),
    ):
        side.valid = ~(total <= 0)
        side.target = aimed / total.where(side.valid, 1)
    if which.row_mask is None or which.col_mask is None:
        return
    back = there & (ranks.own_rows(which.row_mask)[:, None] == which.col_mask[at])
    back = back & _first_of_equal(at.where(back, -1))
    masked = logits.where(back, -torch.inf)
    some = back.any(1)  # a log-sum-exp of nothing would move by NaN in forward mode
    row_lse = masked.where(some[:, None], 0).logsumexp(1)
    rows.lse = add_exponentials(rows.lse, row_lse.where(some, -torch.inf))
    # A log-sum-exp over the rows of each column, shifted by a maximum that needs no gradient.
    lowest = masked.new_full((num_cols,), -torch.inf)
    peak = ranks.maximum(lowest.scatter_reduce(0, flat, masked.detach().flatten(), "amax"))
    peak = peak.where(peak.isfinite(), 0)
    col_sum = by_column((masked - peak[at]).exp())
    some = col_sum > 0
    col_lse = ranks.own_columns(peak) + col_sum.where(some, 1).log()
    cols.lse = add_exponentials(cols.lse, col_lse.where(some, -torch.inf))
    returned = logits.where(back, 0)
    rows.total, cols.total = rows.total + returned.sum(1), cols.total + by_column(returned)
    rows.unmasked = rows.unmasked + back.sum(1)
    cols.unmasked = cols.unmasked + by_column(back.to(torch.int64))
