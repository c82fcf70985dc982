"""similarity_lse: the building block with ids, against the reference in float64."""

import pytest
import torch
from operators import FAST, halves, more_columns

from m3bind.ops import similarity_lse


@pytest.mark.parametrize("backend", FAST)
def test_similarity_lse_equals_the_reference(backend):
    x, y, scale = more_columns(13, logit_scale=3.0).values()
    row_ids, col_ids = halves(x, y)
    weights = torch.randn(30, generator=torch.Generator().manual_seed(0))
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, y, scale)]
        rows, cols = similarity_lse(*leaves, row_ids=row_ids, col_ids=col_ids, backend=name)
        (torch.cat([rows, cols]) * weights.to(dtype)).sum().backward()
        results.append([rows, cols, *(t.grad for t in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", FAST)
def test_everything_left_out(backend):
    leaves = more_columns(13, logit_scale=3.0).values()
    x, y, scale = (t.requires_grad_() for t in leaves)
    ids = torch.zeros(17, dtype=torch.int64)
    rows, cols = similarity_lse(x, y, scale, row_ids=ids[:13], col_ids=ids, backend=backend)
    assert (rows == -torch.inf).all() and (cols == -torch.inf).all()
    torch.autograd.backward((rows, cols), (torch.ones_like(rows), torch.ones_like(cols)))
    for t in (x, y, scale):
        assert (t.grad == 0).all()
