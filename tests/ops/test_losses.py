"""losses.ClipLoss beside open_clip's own, and in somebody's training loop."""

import inspect

import pytest
import torch
from clip_oracle import run, unit_pairs

from m3bind.losses import ClipLoss

open_clip_loss = pytest.importorskip("open_clip.loss")


def parameters(function):
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize("method", ("__init__", "forward"))
def test_signature_is_open_clips(method):
    theirs = parameters(getattr(open_clip_loss.ClipLoss, method))
    ours = parameters(getattr(ClipLoss, method))
    shared = ours[: len(theirs)]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in ours[len(theirs) :])


@pytest.mark.parametrize("n", (1, 48, 130))
@pytest.mark.parametrize("shape", ((), (1,)), ids=("0-D scale", "[1] scale"))
def test_values_and_gradients_are_open_clips(n, shape):
    x, y = unit_pairs(n, 32, seed=n)
    scale = torch.full(shape, 14.3)
    want = run(lambda x, y, s: open_clip_loss.ClipLoss()(x, y, s).sum(), x, y, scale)
    got = run(ClipLoss(), x, y, scale)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_output_dict_and_bias():
    x, y = unit_pairs(12, 8, seed=0)
    bias = torch.tensor(-3.0)
    want = open_clip_loss.ClipLoss()(x, y, torch.tensor(5.0), bias, output_dict=True)
    got = ClipLoss(cache_labels=True)(x, y, torch.tensor(5.0), bias, output_dict=True)
    assert got.keys() == want.keys()
    torch.testing.assert_close(got["contrastive_loss"], want["contrastive_loss"])


def test_several_ranks_are_refused():
    with pytest.raises(ValueError, match="world_size=4"):
        ClipLoss(rank=1, world_size=4)
