"""similarity_stats: see `m3bind.ops.stats` for what the arguments mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3bind.chunked.panels import logsumexp, panels, part, weights
from m3bind.dtypes import accumulation_dtype, statistics_dtype


@dataclass(kw_only=True, slots=True)
class _Panel:
    """Some rows of the matrix, with what each pair counts for."""

    dots: Tensor  # [R, M], less the margin at equal classes
    logits: Tensor  # [R, M]
    positive: Tensor | None  # [R, M] bool: equal classes
    masked: Tensor | None  # [R, M] bool: left out of everything
    single_row: Tensor | None  # [M] bool: a positive of this column stays out of its LSE
    single_col: Tensor | None  # [R, 1] bool: the same of the row

    def for_rows(self) -> Tensor:
        """The logits that enter a row's LSE; the others are -inf."""
        return self._kept(self.single_col)

    def for_columns(self) -> Tensor:
        return self._kept(self.single_row)

    def _kept(self, single: Tensor | None) -> Tensor:
        logits = self.logits if self.masked is None else self.masked_logits(-torch.inf)
        if self.positive is None or single is None:
            return logits
        return logits.masked_fill(self.positive & single, -torch.inf)

    def masked_logits(self, fill: float) -> Tensor:
        return self.logits if self.masked is None else self.logits.masked_fill(self.masked, fill)


def _panel(
    dots: Tensor,  # [R, M]
    scale: Tensor,
    row_class: Tensor | None,
    col_class: Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    margin: float,
) -> _Panel:
    positive = masked = single_row = single_col = None
    if row_class is not None and col_class is not None:
        positive = row_class[:, None] == col_class
        single_col, single_row = (row_class & 1 > 0)[:, None], col_class & 2 > 0
        if margin:
            dots = dots - margin * positive.to(dots.dtype)
    if row_mask is not None and col_mask is not None:
        masked = row_mask[:, None] == col_mask
        if positive is not None:
            masked &= ~positive
    return _Panel(
        dots=dots, logits=dots * scale, positive=positive, masked=masked,
        single_row=single_row, single_col=single_col,
    )  # fmt: skip


def similarity_stats_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    row_class: Tensor | None,  # [N]
    col_class: Tensor | None,  # [M]
    row_mask: Tensor | None,  # [N]
    col_mask: Tensor | None,  # [M]
    margin: float,
    totals: bool,
    kept_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [3, N], [3, M], [kept_rows, M]
    acc, stats = accumulation_dtype(x.dtype), statistics_dtype(x.device)
    wide_y, scale = y.to(acc), logit_scale.to(acc)
    rows, cols = (x.new_zeros(3, t.shape[0], dtype=stats) for t in (x, y))
    rows[0], cols[0] = -torch.inf, -torch.inf
    kept = x.new_empty(kept_rows, y.shape[0], dtype=acc)
    for at in panels(x.shape[0], y.shape[0], kept_rows):
        dots = x[at].to(acc) @ wide_y.T
        if at.stop <= kept_rows:
            kept[at] = dots
        panel = _panel(
            dots, scale, part(row_class, at), col_class, part(row_mask, at), col_mask, margin
        )
        rows[0, at] = logsumexp(panel.for_rows(), 1, stats)
        cols[0] = torch.logaddexp(cols[0], logsumexp(panel.for_columns(), 0, stats))
        if panel.positive is not None:
            wanted = panel.logits.where(panel.positive, 0)
            rows[1, at] = wanted.sum(1, dtype=stats)
            cols[1] += wanted.sum(0, dtype=stats)
        if totals:
            counted = panel.masked_logits(0)
            rows[2, at] = counted.sum(1, dtype=stats)
            cols[2] += counted.sum(0, dtype=stats)
    return rows, cols, kept


def similarity_stats_bwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    row_class: Tensor | None,  # [N]
    col_class: Tensor | None,  # [M]
    row_mask: Tensor | None,  # [N]
    col_mask: Tensor | None,  # [M]
    margin: float,
    totals: bool,
    row_lse: Tensor,  # [N]
    col_lse: Tensor,  # [M]
    kept: Tensor,  # [kept_rows, M]
    grad_rows: Tensor,  # [3, N]
    grad_cols: Tensor,  # [3, M]
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [M, D], []
    """Gradients of x, y and the scale; one that is not needed comes back empty, [0, D]."""
    acc = accumulation_dtype(x.dtype)
    wide_y, scale = y.to(acc), logit_scale.to(acc)
    row_lse, row_weight = weights(row_lse, grad_rows[0], acc)
    col_lse, col_weight = weights(col_lse, grad_cols[0], acc)
    grad_rows, grad_cols = grad_rows.to(acc), grad_cols.to(acc)
    grad_x = torch.zeros(x.shape if need_x else (0, x.shape[1]), dtype=acc, device=x.device)
    grad_y = torch.zeros(y.shape if need_y else (0, y.shape[1]), dtype=acc, device=y.device)
    grad_scale = torch.zeros((), dtype=acc, device=x.device)
    for at in panels(x.shape[0], y.shape[0], len(kept)):
        wide_x = x[at].to(acc)
        dots = kept[at] if at.stop <= len(kept) else wide_x @ wide_y.T
        panel = _panel(
            dots, scale, part(row_class, at), col_class, part(row_mask, at), col_mask, margin
        )
        grad = torch.exp(panel.for_rows() - row_lse[at, None]).mul_(row_weight[at, None])
        grad += torch.exp(panel.for_columns() - col_lse).mul_(col_weight)
        if panel.positive is not None:
            grad += (grad_rows[1, at, None] + grad_cols[1]).where(panel.positive, 0)
        if totals:
            even = grad_rows[2, at, None] + grad_cols[2]
            grad += even if panel.masked is None else even.masked_fill(panel.masked, 0)
        if need_x:
            torch.mm(grad, wide_y, out=grad_x[at])
        if need_y:
            grad_y.addmm_(grad.T, wide_x)
        grad_scale += grad.mul_(panel.dots).sum()
    return grad_x.mul_(scale).to(x.dtype), grad_y.mul_(scale).to(y.dtype), grad_scale
