"""ClipLoss and DistillClipLoss beside open_clip's own."""

import inspect

import distill_oracle
import pytest
import torch
from clip_oracle import run, unit_pairs

from m3bind.losses import ClipLoss, DistillClipLoss

open_clip_loss = pytest.importorskip("open_clip.loss")


def parameters(function):
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize("loss", (ClipLoss, DistillClipLoss))
@pytest.mark.parametrize("method", ("__init__", "forward"))
def test_signature_is_open_clips(loss, method):
    theirs = parameters(getattr(getattr(open_clip_loss, loss.__name__), method))
    ours = parameters(getattr(loss, method))
    shared = ours[: len(theirs)]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in ours[len(theirs) :])


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


@pytest.mark.parametrize("loss", (ClipLoss, DistillClipLoss))
def test_ranks_that_are_not_there_are_refused(loss):
    x = torch.ones(4, 8)
    teacher = (x, x, 1.0) if loss is DistillClipLoss else ()
    with pytest.raises(ValueError, match=rf"^{loss.__name__}: use_horovod=True with world_size=4"):
        loss(rank=1, world_size=4, use_horovod=True)
    with pytest.raises(ValueError, match=rf"^{loss.__name__}: world_size=4, but .* 1 ranks"):
        loss(rank=1, world_size=4)(x, x, 1.0, *teacher)


@pytest.mark.parametrize("n", (1, 48, 130))
@pytest.mark.parametrize("shape", ((), (1,)), ids=("0-D scale", "[1] scale"))
@pytest.mark.parametrize("which", (0, 1), ids=("contrastive", "distill"))
def test_distillation_is_open_clips(n, shape, which):
    given = distill_oracle.features(n, n, 32, 16, seed=n)
    teacher_scale = torch.full(shape, 40.0)

    def term(loss):
        def of(x, y, scale, *teacher):
            return loss(x, y, scale.reshape(shape), *teacher)[which].sum()

        return of

    want = distill_oracle.run(term(open_clip_loss.DistillClipLoss()), given, 14.3, teacher_scale)
    got = distill_oracle.run(term(DistillClipLoss()), given, 14.3, teacher_scale)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_distillation_in_a_training_loop_that_adds_the_dict_up():
    x, y, *teacher = distill_oracle.features(12, 12, 8, 8, seed=0)
    args = (x, y, torch.tensor(5.0), *teacher, torch.tensor(9.0))
    want = open_clip_loss.DistillClipLoss()(*args, output_dict=True)
    got = DistillClipLoss()(*args, output_dict=True)
    assert list(got) == list(want) == ["contrastive_loss", "distill_loss"]
    torch.testing.assert_close(sum(got.values()), sum(want.values()))
