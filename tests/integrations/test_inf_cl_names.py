"""Inf-CL's functions against a float64 formula that is written out here."""

import inspect

import pytest
import torch

from m3bind.integrations import inf_cl

# (N, M, D, why)
SHAPES = [
    (1, 1, 3, "one row"),
    (65, 65, 48, "a block of 64 and one; D no multiple of 256"),
    (33, 70, 17, "more columns than rows"),
]
MEANS = (inf_cl.cal_ring_loss, inf_cl.cal_inf_loss)


def rows_by_hand(q, k, labels, scale):
    """-log(exp(s[label]) / sum(exp(s))) of each row, from plain float64 sums."""
    logits = scale * torch.einsum("nd,md->nm", q.double(), k.double())
    top = logits.max(1, keepdim=True).values
    log_sum = top.squeeze(1) + (logits - top).exp().sum(1).log()
    return log_sum - logits[torch.arange(len(q)), labels]


def case(n, m, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
    k = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=-1)
    labels = torch.randint(m, (n,), generator=generator)
    return q, k, labels


def run(loss_of, weights, *inputs):
    """The value and the gradients of the weighted sum."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = loss_of(*leaves)
    (loss * weights).sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def test_names_and_signatures():
    for name in ("cal_flash_loss", "cal_ring_loss", "cal_inf_loss"):
        parameters = inspect.signature(getattr(inf_cl, name)).parameters
        assert list(parameters) == ["q", "k", "labels", "scale", "head_dim"]
        assert [parameters[p].default for p in ("labels", "scale", "head_dim")] == [None, None, 256]


@pytest.mark.parametrize("n,m,d", [shape[:3] for shape in SHAPES])
@pytest.mark.parametrize("labelled", (False, True))
def test_rows_and_their_gradients(n, m, d, labelled):
    q, k, labels = case(n, m, d)
    given = labels if labelled else None
    used = labels if labelled else torch.arange(n)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(14.2857)
    got = run(lambda q, k, s: inf_cl.cal_flash_loss(q, k, given, s), weights, q, k, scale)
    want = run(
        lambda q, k, s: rows_by_hand(q, k, used, s), weights.double(),
        q.double(), k.double(), scale.double(),
    )  # fmt: skip
    assert got[0].shape == (n,)
    for mine, reference in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), reference, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("function", MEANS)
def test_means_and_their_gradients(function):
    q, k, labels = case(65, 80, 48)
    scale = torch.tensor([30.0])
    one = torch.ones(())
    got = run(lambda q, k, s: function(q, k, labels, s), one, q, k, scale)
    want = run(
        lambda q, k, s: rows_by_hand(q, k, labels, s).mean(), one.double(),
        q.double(), k.double(), scale.double(),
    )  # fmt: skip
    assert got[0].shape == ()
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=2e-5, atol=2e-7)


def test_defaults_are_scale_1_and_the_diagonal():
    q, k, _ = case(40, 40, 24)
    want = rows_by_hand(q, k, torch.arange(40), 1.0)
    torch.testing.assert_close(inf_cl.cal_flash_loss(q, k).double(), want, rtol=1e-6, atol=1e-6)
    for function in MEANS:
        torch.testing.assert_close(function(q, k).double(), want.mean(), rtol=1e-6, atol=1e-6)


def test_head_dim_has_no_effect():
    q, k, _ = case(20, 20, 30)
    assert torch.equal(inf_cl.cal_inf_loss(q, k, head_dim=7), inf_cl.cal_inf_loss(q, k))


def test_65_logits_of_minus_120():
    # Padded with logits of 0 to whole blocks, a maximum of 0 would make the sum 0.
    q, k = torch.full((3, 4), 0.5), torch.full((65, 4), -0.5)
    got = inf_cl.cal_flash_loss(q, k, torch.zeros(3, dtype=torch.int64), 120.0)
    torch.testing.assert_close(got, torch.full((3,), 65.0).log())


def test_both_directions_are_clip_loss():
    from m3bind import clip_loss

    q, k, _ = case(50, 50, 32)
    both = (inf_cl.cal_inf_loss(q, k, scale=20.0) + inf_cl.cal_inf_loss(k, q, scale=20.0)) / 2
    torch.testing.assert_close(both, clip_loss(q, k, 20.0))


def test_mixed_dtypes_and_autocast():
    q, k, _ = case(48, 48, 32)
    want = inf_cl.cal_flash_loss(q, k.bfloat16().float(), scale=20.0)
    torch.testing.assert_close(inf_cl.cal_flash_loss(q, k.bfloat16(), scale=20.0), want)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(inf_cl.cal_flash_loss(q, k.bfloat16(), scale=20.0), want)
