"""What both searches share: their inputs, and scores as integers in the order of the search."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.launch import Inputs
from m3bind_kernels.tuning import choose

# Columns are int32, those of a last tile that reaches beyond the gallery among them.
MOST_COLUMNS = 2**31 - 1024


@triton.jit
def ordered(scores):
    """int32 in the order of the scores: -0 equals 0, NaN is greater than infinity. None is the
    lowest integer, which is left for pairs that are not to be found."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    bits = tl.where(scores != scores, 0x7FFFFFFF, bits)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def search_inputs(
    queries: Tensor, gallery: Tensor, query_ids: Tensor | None, gallery_ids: Tensor | None,
    native: bool = False,
) -> Inputs:  # fmt: skip
    """Queries and gallery as rows and columns of similarity_stats; equal ids are masked pairs."""
    if gallery.shape[0] > MOST_COLUMNS:
        raise ValueError(
            f"the triton search takes galleries of at most {MOST_COLUMNS} rows, not "
            f"{gallery.shape[0]}; search parts of it"
        )
    row_mask, col_mask = None, None
    if query_ids is not None and gallery_ids is not None:
        row_mask, col_mask = _numbered(query_ids, gallery_ids)
    one = torch.ones((), device=queries.device)
    return Inputs.of(queries, gallery, one, None, None, row_mask, col_mask, 0.0, False, native)


def choose_search(inputs: Inputs, attempt: Callable[[Inputs, Config], object]) -> Config:
    """The configuration: of both searches from the same ones, so that their scores are the same."""
    whole = inputs.x.shape[1] % 64 == 0
    return choose("search" if whole else "search_ragged", inputs, attempt)


def _numbered(ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Any int64 ids as small numbers that are equal where the ids are; -1 equals nothing. Without
    torch.unique, for whose result the device would have to be waited for."""
    ids, others = ids.contiguous(), others.contiguous()
    known = ids.sort().values
    if known.shape[0] == 0:
        return ids, torch.full_like(others, -1)
    at = torch.searchsorted(known, others)
    found = known[at.clamp(max=known.shape[0] - 1)] == others
    return torch.searchsorted(known, ids), at.where(found, -1)
