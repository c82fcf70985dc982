"""How a contrastive loss is composed of the statistics of rows and columns, with every feature."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3bind.dtypes import accumulation_dtype
from m3bind.ops import arguments, pairs, soft
from m3bind.ops.direction import Side, add_exponentials, direction_loss
from m3bind.ops.ranks import Ranks
from m3bind.ops.stats import rows_to_keep

REDUCTIONS = ("mean", "sum", "none")
DIRECTIONS = ("both", "rows", "columns")

Ids = Tensor | tuple[Tensor, Tensor]


@dataclass(kw_only=True, slots=True)
class Terms:
    """What a loss adds to plain InfoNCE: the arguments of `clip_loss`, checked."""

    bias: Tensor | None = None
    labels: Tensor | None = None
    positive_ids: tuple[Tensor, Tensor] | None = None
    mask_ids: tuple[Tensor, Tensor] | None = None
    negatives: Tensor | None = None
    soft_targets: tuple[Tensor, Tensor] | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    margin: float = 0.0
    directions: str = "both"
    reduction: str = "mean"

    @classmethod
    def checked(
        cls,
        op: str,
        x: Tensor,
        y: Tensor,
        num_columns: int | None,
        *,
        bias: Tensor | float | None,
        labels: Tensor | None,
        positive_ids: Ids | None,
        mask_ids: Ids | None,
        negatives: Tensor | None = None,
        soft_targets: tuple[Tensor, Tensor] | None = None,
        margin: float = 0.0,
        **more: Any,
    ) -> "Terms":
        """None of the columns is named that is not below `num_columns`, where that is known."""
        arguments.one_of(op, labels=labels, positive_ids=positive_ids, soft_targets=soft_targets)
        if soft_targets is not None and margin:
            raise ValueError(
                f"{op}: margin={margin} with soft_targets: a margin needs positives; pass labels "
                "or positive_ids, or margin=0"
            )
        if labels is not None:
            labels = arguments.labels(op, labels, x, num_columns)
        if soft_targets is not None:
            soft_targets = arguments.soft_targets(op, soft_targets, x, num_columns)
        return cls(
            bias=None if bias is None else arguments.scalar(op, "logit_bias", bias, x),
            labels=labels,
            positive_ids=_id_pair(op, "positive_ids", positive_ids, x, y),
            mask_ids=_id_pair(op, "mask_ids", mask_ids, x, y),
            negatives=None if negatives is None else arguments.negatives(op, negatives, x),
            soft_targets=soft_targets,
            margin=margin,
            **more,
        )

    def check_columns(self, op: str, num_columns: int) -> None:
        """What `checked` could not see before the number of columns was known."""
        if self.labels is not None:
            arguments.below(op, "labels", self.labels, num_columns)
        if self.soft_targets is not None:
            arguments.below(op, "columns of soft_targets", self.soft_targets[0], num_columns)

    def which(self) -> dict[str, Any]:
        """Which pairs are positive and which are left out, as arguments of the reference."""
        return {
            "labels": self.labels, "positive_ids": self.positive_ids, "mask_ids": self.mask_ids,
        }  # fmt: skip

    def features(self) -> dict[str, Any]:
        """All that plain InfoNCE does not have, as arguments of the reference."""
        return self.which() | {
            "logit_bias": self.bias, "negatives": self.negatives,
            "soft_targets": self.soft_targets, "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }  # fmt: skip

    def pairs(
        self, x: Tensor, y: Tensor, ranks: Ranks, diagonal: pairs.Pairs | None = None
    ) -> pairs.Pairs:
        """Of all rows [N] and columns [M]; `diagonal` says that nothing else was asked for."""
        if self.soft_targets is not None:
            which = pairs.Pairs()
        elif self.positive_ids is not None:
            which = pairs.of_ids(*_of_all(self.positive_ids, ranks))
        elif self.labels is not None:
            which = pairs.of_labels(ranks.all_rows(self.labels), ranks.totals(x, y)[1])
        else:
            which = ranks.diagonal(x, y) if diagonal is None else diagonal
        if self.mask_ids is not None:
            which = which.masked_by(*_of_all(self.mask_ids, ranks))
        return which


def _id_pair(
    op: str, name: str, value: Ids | None, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor] | None:
    return None if value is None else arguments.id_pair(op, name, value, x, y)


def _of_all(ids: tuple[Tensor, Tensor], ranks: Ranks) -> tuple[Tensor, Tensor]:
    return ranks.all_rows(ids[0]), ranks.all_columns(ids[1])


def composed(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    scale: Tensor,  # []
    terms: Terms,
    ranks: Ranks,
    memory_budget: float | None,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss out of the statistics of rows and columns, with every feature."""
    acc = accumulation_dtype(x.dtype)
    if terms.negatives is not None or terms.soft_targets is not None:
        # Several gradients meet in x and y: each on its own would be rounded to 16 bit.
        x, y = x.to(acc), y.to(acc)
    which = terms.pairs(x, y, ranks)
    totals = terms.label_smoothing > 0
    kept_rows = rows_to_keep(x, ranks.totals(x, y)[1], memory_budget, totals, backend)
    rows, cols = ranks.similarity_stats(
        x, y, scale, which, margin=terms.margin, totals=totals, kept_rows=kept_rows,
        backend=backend,
    )  # fmt: skip
    left = which.unmasked(*ranks.totals(x, y)) if totals else (1, 1)
    row_side = _side(rows, which.row_positives, left[0], ranks.own_rows)
    col_side = _side(cols, which.col_positives, left[1], ranks.own_columns)
    if terms.soft_targets is not None:
        soft.add_targets(row_side, col_side, x, y, scale, *terms.soft_targets, which, ranks)
    if terms.negatives is not None:
        _add_negatives(row_side, x, scale, terms.negatives.to(acc), totals, ranks, backend)
    sides = {"rows": (row_side,), "columns": (col_side,), "both": (row_side, col_side)}
    losses = [
        direction_loss(side, terms.bias, terms.label_smoothing, terms.z_loss, acc)
        for side in sides[terms.directions]
    ]
    return ranks.reduce(losses, terms.reduction)


def _side(
    stats: Tensor,  # [3, L]
    positives: Tensor | None,
    unmasked: Tensor | int,
    own: Callable[[Tensor], Tensor],
) -> Side:
    return Side(
        lse=stats[0],
        target=stats[1],
        total=stats[2],
        positives=None if positives is None else own(positives),
        unmasked=own(unmasked) if isinstance(unmasked, Tensor) else unmasked,
    )


def _add_negatives(
    rows: Side,
    x: Tensor,
    scale: Tensor,
    negatives: Tensor,
    totals: bool,
    ranks: Ranks,
    backend: str,
) -> None:
    """Further columns of the rows' denominator."""
    if negatives.dim() == 2:
        extra = ranks.extra_stats(x, negatives, scale, totals=totals, backend=backend)
        lse, total = extra[0], extra[2]
    else:
        logits = scale * torch.einsum("nd,nkd->nk", x, negatives)
        lse, total = logits.logsumexp(1), logits.sum(1)
    rows.lse = add_exponentials(rows.lse, lse.to(rows.lse.dtype))
    rows.total = rows.total + total
    rows.unmasked = rows.unmasked + ranks.negatives(negatives)
