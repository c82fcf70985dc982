"""What the schemes compute of some rows and some columns: the operators' primitives."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from m3bind.dtypes import accumulation_dtype
from m3bind.ops.pairs import Pairs

Features: TypeAlias = Sequence[Tensor]


def _part(values: Tensor | None, at: slice) -> Tensor | None:
    return None if values is None else values[at]


@dataclass(kw_only=True, slots=True)
class PairJob:
    """Pairs and scalars are those of the whole batch; a call gets slices of rows and columns."""

    which: Pairs
    scalars: Features  # of which there are gradients
    backend: str
    more_x: Features = ()  # the teacher's, without gradients
    more_y: Features = ()
    row_info: Tensor = field(default_factory=lambda: torch.empty(0))  # [C, N], see `carried`
    col_info: Tensor = field(default_factory=lambda: torch.empty(0))

    def _which(self, rows: slice, cols: slice) -> tuple[Tensor | None, ...]:
        which = self.which
        return (
            _part(which.row_class, rows), _part(which.col_class, cols),
            _part(which.row_mask, rows), _part(which.col_mask, cols),
        )  # fmt: skip

    def bound(self, scalars: Features, row_info: Tensor, col_info: Tensor):
        """The same with what the backward pass needs of every row and every column."""
        return replace(self, scalars=scalars, row_info=row_info, col_info=col_info)


@dataclass(kw_only=True, slots=True)
class StatsJob(PairJob):
    """`m3bind.ops.stats`."""

    margin: float
    totals: bool
    kept_rows: int
    dtype: torch.dtype  # in which it computes; features may travel in a narrower one

    def _given(self, x: Features, y: Features, rows: slice, cols: slice) -> tuple:
        return (
            x[0].to(self.dtype), y[0].to(self.dtype), self.scalars[0], *self._which(rows, cols),
            self.margin, self.totals,
        )  # fmt: skip

    def forward(
        self, x: Features, y: Features, rows: slice, cols: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        found_rows, found_cols, kept = torch.ops.m3bind.similarity_stats_fwd(
            *self._given(x, y, rows, cols), self.kept_rows, self.backend
        )
        return found_rows, found_cols, kept if self.kept_rows else None

    @staticmethod
    def merged(parts: Tensor) -> Tensor:  # [V, 3, L] -> [3, L]
        # Nothing beside nothing, an empty rank or a masked row, is -inf and not NaN here.
        return torch.cat([parts[:, :1].logsumexp(0), parts[:, 1:].sum(0)])

    @staticmethod
    def carried(found: Tensor, grad: Tensor) -> Tensor:  # [4, L]
        return torch.cat([found[:1], grad])

    def backward(
        self, x: Features, y: Features, rows: slice, cols: slice, kept: Tensor | None,
        need_x: bool, need_y: bool,
    ) -> tuple[Tensor, Tensor, Features]:  # fmt: skip
        acc = accumulation_dtype(self.dtype)
        by_rows, by_cols = self.row_info[:, rows], self.col_info[:, cols]
        kept = x[0].new_empty(0, y[0].shape[0], dtype=acc) if kept is None else kept
        grad_x, grad_y, *scalars = torch.ops.m3bind.similarity_stats_bwd(
            *self._given(x, y, rows, cols), by_rows[0], by_cols[0], kept, by_rows[1:],
            by_cols[1:], need_x, need_y, self.backend,
        )  # fmt: skip
        return grad_x, grad_y, scalars


@dataclass(kw_only=True, slots=True)
class DistillJob(PairJob):
    """`m3bind.ops.distill`: of each row the divergence and both log-sum-exps."""

    teacher_scale: Tensor
    kl: bool
    kept_rows: int

    def _given(self, x: Features, y: Features, rows: slice, cols: slice) -> tuple:
        return (
            x[0], y[0], self.scalars[0], x[1], y[1], self.teacher_scale,
            *self._which(rows, cols)[2:],
        )  # fmt: skip

    def forward(
        self, x: Features, y: Features, rows: slice, cols: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        row_loss, col_loss, row_lse, col_lse, kept = torch.ops.m3bind.similarity_distill_fwd(
            *self._given(x, y, rows, cols), self.kl, self.kept_rows, self.backend
        )
        found = torch.cat([row_loss[None], row_lse]), torch.cat([col_loss[None], col_lse])
        return *found, kept if self.kept_rows else None

    def merged(self, parts: Tensor) -> Tensor:  # [V, 3, L] -> [3, L]
        """A part's divergence is that of its distributions: it counts with the teacher's share of
        the part, and with how both shares differ from the whole."""
        loss, lse = parts[:, 0], parts[:, 1:]
        whole = lse.logsumexp(0)
        share = (lse - whole).masked_fill(lse == -torch.inf, 0.0)  # [V, 2, L], logarithms
        student, teacher = share.unbind(1)
        apart = (teacher if self.kl else 0) - student
        empty = lse[:, 1] == -torch.inf
        found = (teacher.exp() * (loss + apart)).masked_fill(empty, 0.0).sum(0)
        return torch.cat([found.masked_fill(empty.all(0), torch.nan)[None], whole])

    @staticmethod
    def carried(found: Tensor, grad: Tensor) -> Tensor:  # [3, L]
        return torch.cat([found[1:], grad[:1]])

    def backward(
        self, x: Features, y: Features, rows: slice, cols: slice, kept: Tensor | None,
        need_x: bool, need_y: bool,
    ) -> tuple[Tensor, Tensor, Features]:  # fmt: skip
        by_rows, by_cols = self.row_info[:, rows], self.col_info[:, cols]
        if kept is None:
            acc = accumulation_dtype(torch.promote_types(x[0].dtype, x[1].dtype))
            kept = x[0].new_empty(2, 0, y[0].shape[0], dtype=acc)
        grad_x, grad_y, *scalars = torch.ops.m3bind.similarity_distill_bwd(
            *self._given(x, y, rows, cols), by_rows[:2], by_cols[:2], kept, by_rows[2],
            by_cols[2], need_x, need_y, self.backend,
        )  # fmt: skip
        return grad_x, grad_y, scalars


@dataclass(kw_only=True, slots=True)
class SigmoidJob(PairJob):
    """`m3bind.ops.siglip`: each row's sum. The columns have no statistics."""

    def _given(self, x: Features, y: Features, rows: slice, cols: slice) -> tuple:
        return x[0], y[0], *self.scalars, *self._which(rows, cols)

    def forward(
        self, x: Features, y: Features, rows: slice, cols: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return torch.ops.m3bind.siglip_fwd(
            *self._given(x, y, rows, cols), self.backend
        )[None], None, None  # fmt: skip

    @staticmethod
    def merged(parts: Tensor) -> Tensor:  # [V, 1, L] -> [1, L]
        return parts.sum(0)

    @staticmethod
    def carried(found: Tensor, grad: Tensor) -> Tensor:
        return grad

    def backward(
        self, x: Features, y: Features, rows: slice, cols: slice, kept: Tensor | None,
        need_x: bool, need_y: bool,
    ) -> tuple[Tensor, Tensor, Features]:  # fmt: skip
        grad_x, grad_y, *scalars = torch.ops.m3bind.siglip_bwd(
            *self._given(x, y, rows, cols), self.row_info[0, rows], need_x, need_y, self.backend
        )
        return grad_x, grad_y, scalars


@dataclass(kw_only=True, slots=True)
class SigmoidTotalJob(SigmoidJob):
    """The sum of all pairs, as a first scalar, with its gradients: both in one pass."""

    def backward(
        self, x: Features, y: Features, rows: slice, cols: slice, kept: Tensor | None,
        need_x: bool, need_y: bool,
    ) -> tuple[Tensor, Tensor, Features]:  # fmt: skip
        total, grad_x, grad_y, *scalars = torch.ops.m3bind.siglip_total_fwd(
            *self._given(x, y, rows, cols), False, need_x, need_y, self.backend
        )
        return grad_x, grad_y, [total, *scalars]


@dataclass(kw_only=True, slots=True)
class ListedJob(PairJob):
    """Dot products of rows with the columns that they list."""

    columns: Tensor  # [N, K]

    def _listed(self, rows: slice, cols: slice):
        """For each place of the lists: rows' column, counted within these columns, and whether it
        is one of them."""
        for at in self.columns[rows].unbind(1):
            inside = (at >= cols.start) & (at < cols.stop)
            yield (at - cols.start).where(inside, 0), inside[:, None]

    def forward(
        self, x: Features, y: Features, rows: slice, cols: slice
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        acc = accumulation_dtype(x[0].dtype)
        wide_x, found = x[0].to(acc), []
        for at, inside in self._listed(rows, cols):
            found.append((wide_x * _rows(y[0], at, inside, acc)).sum(1))
        return _stack(found, wide_x), None, None

    merged = staticmethod(SigmoidJob.merged)
    carried = staticmethod(SigmoidJob.carried)

    def backward(
        self, x: Features, y: Features, rows: slice, cols: slice, kept: Tensor | None,
        need_x: bool, need_y: bool,
    ) -> tuple[Tensor, Tensor, Features]:  # fmt: skip
        acc = accumulation_dtype(x[0].dtype)
        wide_x = x[0].to(acc)
        grad_x = torch.zeros_like(wide_x)
        grad_y = torch.zeros_like(y[0], dtype=acc)
        weights = self.row_info[:, rows].to(acc)
        for (at, inside), weight in zip(self._listed(rows, cols), weights, strict=True):
            if need_x:
                grad_x += weight[:, None] * _rows(y[0], at, inside, acc)
            if need_y and len(grad_y):
                grad_y.index_add_(0, at, (weight[:, None] * wide_x).where(inside, 0))
        return grad_x[: None if need_x else 0], grad_y[: None if need_y else 0], ()


def _rows(y: Tensor, at: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """y[at] in `dtype`, 0 where it is not inside."""
    if y.shape[0] == 0:
        return y.new_zeros(at.shape[0], y.shape[1], dtype=dtype)
    return y[at].to(dtype).where(inside, 0)


def _stack(rows: list[Tensor], x: Tensor) -> Tensor:  # [K, n]
    return torch.stack(rows) if rows else x.new_empty(0, x.shape[0])
