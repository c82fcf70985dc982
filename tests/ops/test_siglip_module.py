"""losses.SigLipLoss beside open_clip's own."""

import inspect

import pytest
import torch
from clip_oracle import unit_pairs
from siglip_oracle import run

from m3bind.losses import SigLipLoss


@pytest.fixture
def theirs():
    return pytest.importorskip("open_clip.loss").SigLipLoss


@pytest.mark.parametrize("method", ("__init__", "forward"))
def test_signature_is_open_clips(theirs, method):
    ours, wanted = (
        list(inspect.signature(getattr(kind, method)).parameters.values())
        for kind in (SigLipLoss, theirs)
    )
    shared = ours[: len(wanted)]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in wanted
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in ours[len(wanted) :])


@pytest.mark.parametrize("n", (1, 48, 130))
@pytest.mark.parametrize("shape", ((), (1,)), ids=("0-D scale", "[1] scale"))
def test_values_and_gradients_are_open_clips(theirs, n, shape):
    x, y = unit_pairs(n, 32, seed=n)
    scale, bias = torch.full(shape, 14.3), torch.full(shape, -10.0)
    want = run(lambda *a: theirs()(*a).sum(), x, y, scale, bias)
    got = run(SigLipLoss(), x, y, scale, bias)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_output_dict_and_no_bias(theirs):
    x, y = unit_pairs(12, 8, seed=0)
    want = theirs()(x, y, torch.tensor(5.0), None, output_dict=True)
    got = SigLipLoss(cache_labels=True)(x, y, torch.tensor(5.0), None, output_dict=True)
    assert got.keys() == want.keys() == {"contrastive_loss"}
    torch.testing.assert_close(got["contrastive_loss"], want["contrastive_loss"])
