"""Every instruction set of the native kernels that this processor has keeps the error bounds."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from clip_oracle import errors, needs_native, run, truth, unit_pairs

from m3bind.ops import clip_loss

CLIP = """
import sys
sys.path.insert(0, sys.argv[1])
from clip_oracle import errors, run, truth, unit_pairs
from m3bind import _C
from m3bind.ops import clip_loss
x, y = unit_pairs(141, 37, seed=0, noise=2.0)
for scale in (20.0, -3.0, 0.0, 3000.0):
    got = run(lambda *a: clip_loss(*a, backend="cpp"), x, y, scale)
    for name, error in errors(got, truth(x, y, scale)).items():
        assert error < 1e-6 * max(10.0, abs(scale)), (scale, name, error)
print(_C.cpu_capability)
"""

SIGLIP = """
import sys
sys.path.insert(0, sys.argv[1])
from clip_oracle import errors, unit_pairs
from siglip_oracle import run, truth
from m3bind import _C
from m3bind.ops import siglip_loss
x, y = unit_pairs(141, 37, seed=0, noise=2.0)
for scale, bias in ((20.0, -10.0), (-3.0, 0.0), (0.0, -2.0), (100.0, -60.0), (3000.0, 5.0)):
    got = run(lambda *a: siglip_loss(*a, backend="cpp"), x, y, scale, bias)
    for name, error in errors(got, truth(x, y, scale, bias)).items():
        assert error < 1e-6 * max(5.0, abs(scale) / 10), (scale, name, error)
print(_C.cpu_capability)
"""

DISTILL = """
import sys
sys.path.insert(0, sys.argv[1])
from clip_oracle import errors
from distill_oracle import features, run, truth
from m3bind import _C
from m3bind.ops import similarity_distill
for kind in ("kl", "ce"):
    for scale, teacher_scale in ((20.0, 9.0), (-3.0, 100.0), (0.0, 14.0), (3000.0, 30.0)):
        given = features(141, 77, 37, 11, seed=0)
        got = run(similarity_distill, given, scale, teacher_scale, kind=kind, backend="cpp")
        want = truth(given, scale, teacher_scale, kind=kind)
        for name, error in errors(got, want).items():
            assert error < 1e-6 * max(10.0, abs(scale)), (kind, scale, name, error)
    x, y, _, _ = given
    for scale in (20.0, 3000.0):
        for value in run(similarity_distill, (x, y, x, y), scale, scale, backend="cpp").values():
            assert not value.any(), scale
print(_C.cpu_capability)
"""

SEARCH = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from search_oracle import check, integers, orders, some_ids, want_ranks, want_topk
from m3bind import _C
from m3bind.ops import similarity_rank, similarity_topk
queries, gallery = integers(37, 300, seed=0), integers(203, 300, seed=1)
queries[3, 5] = gallery[100, 7] = torch.nan
ids = some_ids(37, seed=2), some_ids(203, seed=3)
found = orders(queries, gallery, ids)
check(similarity_topk(queries, gallery, 20, exclude_ids=ids, backend="cpp"), want_topk(found, 20))
labels = torch.arange(203).expand(37, 203)
ranks = similarity_rank(queries, gallery, labels, exclude_ids=ids, backend="cpp")
assert torch.equal(ranks, want_ranks(found, labels))
torch.manual_seed(0)
queries, gallery = torch.randn(40, 600), torch.randn(6000, 600)
values, indices = similarity_topk(queries, gallery, 4, backend="cpp")
assert indices.equal((queries.double() @ gallery.double().T).topk(4).indices)
print(_C.cpu_capability, hash((*values.flatten().tolist(), *indices.flatten().tolist())))
"""


def printed(script: str, capability: str) -> str:
    """What the script prints in a process of that instruction set; skipped where there is none."""
    done = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__)],
        env={**os.environ, "M3BIND_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if "this processor does not have it" in done.stderr:
        pytest.skip(f"no {capability} on this processor")
    assert done.returncode == 0, done.stderr
    used, _, rest = done.stdout.strip().partition(" ")
    assert used == capability
    return rest


CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")
SCRIPTS = {"clip_loss": CLIP, "siglip_loss": SIGLIP, "similarity_distill": DISTILL}


@needs_native
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("operator", SCRIPTS)
def test_error_against_float64(operator, capability):
    printed(SCRIPTS[operator], capability)


@pytest.fixture(scope="module")
def searches() -> dict[str, str]:
    return {}


@needs_native
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_search_gives_the_same_bits(capability, searches):
    # Fused multiply-adds in the same order, and a first look that loses nothing; default has none.
    searches[capability] = printed(SEARCH, capability)
    assert len({found for name, found in searches.items() if name != "default"}) <= 1


@needs_native
def test_bfloat16_where_onednn_is_forbidden():
    """Its products are then those of float32, and no worse."""
    x, y = unit_pairs(300, 64, seed=0, dtype=torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        got = run(partial(clip_loss, backend="cpp"), x, y, 20.0)
    for name, error in errors(got, truth(x, y, 20.0)).items():
        assert error < 5e-3, (name, error)
