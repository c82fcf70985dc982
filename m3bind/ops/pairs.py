"""Which pairs are positive and which leave the denominator, in the form that kernels compare."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

ONE_COLUMN, ONE_ROW = 1, 2  # bits of a class, see m3bind.ops.stats


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Classes and masks, int32, of rows [N] and columns [M]; -1 is equal to nothing."""

    row_class: Tensor | None = None
    col_class: Tensor | None = None
    row_positives: Tensor | None = None  # [N] int64: how many positives each row has
    col_positives: Tensor | None = None
    row_mask: Tensor | None = None
    col_mask: Tensor | None = None

    def masked_by(self, row_ids: Tensor, col_ids: Tensor) -> "Pairs":
        """Pairs with equal ids leave the denominator, unless they are positive."""
        row_mask, col_mask = dense(row_ids, col_ids)
        return replace(self, row_mask=row_mask.int(), col_mask=col_mask.int())

    def unmasked(self, num_rows: int, num_cols: int) -> tuple[Tensor | int, Tensor | int]:
        """How many columns are left for each row, and how many rows for each column."""
        if self.row_mask is None or self.col_mask is None:
            return num_cols, num_rows
        row_out, col_out = counts(self.row_mask, self.col_mask)
        if self.row_class is not None and self.col_class is not None:
            # A pair that is equal in both is positive, and stays.
            row_both = self.row_class.long() << 32 | self.row_mask
            col_both = self.col_class.long() << 32 | self.col_mask
            row_both = row_both.where((self.row_class >= 0) & (self.row_mask >= 0), -1)
            row_stay, col_stay = counts(*dense(row_both, col_both))
            row_out, col_out = row_out - row_stay, col_out - col_stay
        return num_cols - row_out, num_rows - col_out


def diagonal(num_rows: int, num_cols: int, device: torch.device) -> Pairs:
    """Row i and column i are positive; columns beyond the rows have no positive."""
    row_class, col_class = diagonal_classes(num_rows, num_cols, device)
    return Pairs(
        row_class=row_class,
        col_class=col_class,
        row_positives=torch.ones(num_rows, dtype=torch.int64, device=device),
        col_positives=(torch.arange(num_cols, device=device) < num_rows).long(),
    )


def diagonal_classes(
    num_rows: int, num_cols: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # [N], [M]
    classes = torch.arange(
        ONE_ROW + ONE_COLUMN, 4 * num_cols + 3, 4, device=device, dtype=torch.int32
    )
    return classes[:num_rows], classes


def of_labels(labels: Tensor, num_cols: int) -> Pairs:
    """Each row's positive is the column that its label names; below 0: none."""
    return _pairs(labels.clamp(min=-1), torch.arange(num_cols, device=labels.device))


def of_ids(row_ids: Tensor, col_ids: Tensor) -> Pairs:
    """Pairs with equal ids are positive."""
    return _pairs(*dense(row_ids, col_ids))


def _pairs(row_number: Tensor, col_number: Tensor) -> Pairs:
    row_positives, col_positives = counts(row_number, col_number)
    # Of a class: its columns are the positives of its rows, and the other way round.
    num_classes = col_number.shape[0]
    cols = _histogram(col_number, num_classes)
    rows = _histogram(row_number, num_classes)
    bits = ONE_COLUMN * (cols == 1) + ONE_ROW * (rows == 1)
    return Pairs(
        row_class=_lookup(4 * torch.arange(num_classes, device=bits.device) + bits, row_number, -1),
        col_class=_lookup(4 * torch.arange(num_classes, device=bits.device) + bits, col_number, -1),
        row_positives=row_positives,
        col_positives=col_positives,
    )


def dense(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers below M that are equal where the ids are; -1 for a row that no column equals."""
    if col_ids.shape[0] == 0:
        return torch.full_like(row_ids, -1), col_ids
    ordered, order = col_ids.sort()
    number = F.pad(ordered[1:] != ordered[:-1], (1, 0)).cumsum(0)
    at = torch.searchsorted(ordered, row_ids).clamp(max=col_ids.shape[0] - 1)
    return number[at].where(ordered[at] == row_ids, -1), torch.empty_like(number).scatter(
        0, order, number
    )


def counts(row_number: Tensor, col_number: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns have a row's number, and how many rows a column's."""
    num = col_number.shape[0]
    return (
        _lookup(_histogram(col_number, num), row_number, 0).long(),
        _lookup(_histogram(row_number, num), col_number, 0).long(),
    )


def _histogram(numbers: Tensor, num: int) -> Tensor:
    """How often 0, ..., num - 1 occur; -1 is passed over."""
    bins = torch.zeros(num + 1, dtype=torch.int64, device=numbers.device)
    return bins.scatter_add(0, numbers.long() + 1, torch.ones_like(numbers, dtype=torch.int64))[1:]


def _lookup(table: Tensor, at: Tensor, missing: int) -> Tensor:
    """int32 table[at], `missing` where `at` is -1."""
    if table.shape[0] == 0:
        return torch.full_like(at, missing, dtype=torch.int32)
    return table[at.clamp(min=0).long()].where(at >= 0, missing).int()
