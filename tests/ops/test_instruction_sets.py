"""Every instruction set of the native kernels that this processor has keeps the error bounds."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from clip_oracle import errors, needs_native, run, truth, unit_pairs

from m3bind.ops import clip_loss

SCRIPT = Path(__file__).with_name("every_kernel.py")
CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(scope="module")
def searches() -> dict[str, str]:
    return {}


@needs_native
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_operator(capability, searches):
    """Against float64; and a search gives the same bits with each."""
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "M3BIND_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    if "this processor does not have it" in done.stderr:
        pytest.skip(f"no {capability} on this processor")
    assert done.returncode == 0, done.stderr
    used, searches[capability] = done.stdout.split()
    assert used == capability
    # Fused multiply-adds in the same order, and a first look that loses nothing; default has none.
    assert len({found for name, found in searches.items() if name != "default"}) <= 1


@needs_native
def test_bfloat16_where_onednn_is_forbidden():
    """Its products are then those of float32, and no worse."""
    x, y = unit_pairs(300, 64, seed=0, dtype=torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        got = run(partial(clip_loss, backend="cpp"), x, y, 20.0)
    for name, error in errors(got, truth(x, y, 20.0)).items():
        assert error < 5e-3, (name, error)
