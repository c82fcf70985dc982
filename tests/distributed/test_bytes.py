"""What a rank sends is what the docstring says."""

import models
import pytest
import torch
from cases import parts
from test_losses_over_ranks import SCHEMES, D, E, case_of

NUMBERS = 8  # bytes of a statistic
RECORD = 23 * 8  # what each call exchanges: numbers of `Brought`


def expected(loss, scheme, rows, cols, size, rank):
    """By gathering, by the columns' owners, and round the ring."""
    W, n, m = len(rows), max(rows), max(cols)
    student, teacher = D * size, (E * size if loss == "similarity_distill" else 0)
    both, M = student + teacher, sum(cols)
    directions = 1 if loss == "siglip_loss" else 2
    gathered = RECORD + 2 * directions * NUMBERS  # sums and counts
    swapped = 0
    if loss != "siglip_loss":
        swapped = 3 * NUMBERS * (M - cols[rank])
        carried = 4 if loss == "clip_loss" else 3
        gathered += (n + m + 1) * carried * NUMBERS  # one for the call's number
    ring = 0
    if scheme == "gather":
        gathered += (n + m) * both
    else:
        blocks = [max(1, count) for count in cols]  # no rows travel as one
        there = sum(blocks) - blocks[(rank + 1) % W]  # all but the next rank's, which is its own
        ring = there * (both if loss == "siglip_loss" else 2 * both) + sum(blocks) * D * 4
    return {"gather": (W - 1) * gathered, "swap": swapped, "ring": ring}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", ("clip_loss", "siglip_loss", "similarity_distill"))
def test_bytes(pools, loss, scheme, dtype):
    for rows in ([6, 6, 6], [8, 5, 0]):
        case = case_of(loss, rows, rows, dtype)
        given = [(*part, {"scheme": scheme}) for part in parts(case)]
        for rank, found in enumerate(pools(3).run(models.counted, given)):
            want = expected(loss, scheme, rows, rows, dtype.itemsize, rank)
            assert found == {kind: count for kind, count in want.items() if count}
