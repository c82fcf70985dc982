"""What is particular to siglip_loss: its work and memory, and one formula for all reductions."""

import subprocess
import sys

import pytest
import torch
from clip_oracle import errors, needs_native, unit_pairs
from operators import FAST, more_columns
from siglip_oracle import run, truth

from m3bind.ops import siglip_loss


def products(step):
    """Names of the operators that a step calls, and its GEMMs in units of N x M x D."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    found = profile.key_averages(group_by_input_shape=True)
    gemms = sum(e.count for e in found if e.key in ("aten::mm", "aten::addmm_"))
    return {e.key.removeprefix("m3bind::") for e in found if e.key.startswith("m3bind::")}, gemms


@pytest.mark.parametrize("backend", FAST)
def test_work(backend):
    """Three GEMMs for a scalar whose gradient is wanted, four for rows, one without gradients."""
    leaves = more_columns(13, logit_scale=3.0, logit_bias=-1.0).values()
    x, y, scale, bias = (t.requires_grad_() for t in leaves)

    def loss(reduction):
        return siglip_loss(x, y, scale, bias, reduction=reduction, backend=backend)

    cases = [
        (3, {"siglip_total_fwd"}, lambda: loss("mean").backward()),
        (3, {"siglip_total_fwd"}, lambda: loss("sum").backward()),
        (4, {"siglip_fwd", "siglip_bwd"}, lambda: loss("none").sum().backward()),
        (1, {"siglip_fwd"}, lambda: torch.no_grad()(loss)("mean")),
    ]
    frozen = [t.detach() for t in (x, y, scale, bias)]
    cases.append((1, {"siglip_fwd"}, lambda: siglip_loss(*frozen, backend=backend)))
    one = [frozen[0], y, *frozen[2:]]
    cases.append(
        (
            2,
            {"siglip_total_fwd"},
            lambda: siglip_loss(*one, backend=backend).backward(),
        )
    )
    for gemms, names, step in cases:
        called, counted = products(step)
        assert called == names
        # The C++ kernels call their GEMMs below the profiler.
        assert counted == (gemms if backend == "chunked" else 0), names


MEMORY_SCRIPT = """
import resource, sys, torch
from m3bind.ops import siglip_loss
x, y = (torch.randn(14000, 4, requires_grad=True) for _ in range(2))
siglip_loss(x[:64], y[:64], 1.0, backend=sys.argv[1]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for reduction in ("mean", "none"):
    siglip_loss(x, y, 1.0, -5.0, reduction=reduction, backend=sys.argv[1]).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("backend", (pytest.param("chunked", marks=pytest.mark.slow), FAST[1]))
def test_memory_holds_no_matrix(backend):
    # The matrix of 14000 x 14000 is 748 MiB.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, backend], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < {"chunked": 374, "cpp": 100}[backend]


@needs_native
@pytest.mark.slow
def test_more_pairs_than_32_bits_count():
    # All logits are 0, so the results are known, and float32 holds the sums of GEMMs exactly.
    n, m = 46400, 46300
    x, y = torch.ones(n, 1, requires_grad=True), torch.ones(m, 1, requires_grad=True)
    labels = torch.full((n,), -100)
    scale = torch.tensor(0.5, requires_grad=True)
    loss = siglip_loss(x, y, scale, -0.5, labels=labels, reduction="sum", backend="cpp")
    loss.backward()
    assert n * m > 2**31
    torch.testing.assert_close(loss / (n * m), torch.tensor(2.0).log(), rtol=1e-6, atol=0)
    assert scale.grad == torch.tensor(0.5 * n * m)
    assert (x.grad == 0.25 * m).all()
    assert (y.grad == 0.25 * n).all()


@pytest.mark.parametrize("backend", FAST)
def test_one_gradient_formula_for_scalars_and_rows(backend):
    x, y = unit_pairs(90, 20, seed=3)
    rows = run(
        lambda *a: siglip_loss(*a, reduction="none", backend=backend).sum() / 90, x, y, 9.0, -4.0
    )
    mean = run(lambda *a: siglip_loss(*a, backend=backend), x, y, 9.0, -4.0)
    for name in rows:
        torch.testing.assert_close(rows[name], mean[name], rtol=1e-5, atol=1e-8)
    assert max(errors(mean, truth(x, y, 9.0, -4.0)).values()) < 2e-6
