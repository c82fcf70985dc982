"""The losses of stage 1 between two experts, by hand and against their definition in NumPy."""

import numpy as np
import pytest
import torch
from dense_oracle import dense_clip, mean_kl, similarities, softmax, unit

from m3bind.tasks.align import agreement_loss, equal_texts


def test_orthogonal_and_opposite() -> None:
    x = torch.eye(4)[:2]
    assert float(agreement_loss(x, x, "mse")) == 0
    assert float(agreement_loss(x, torch.eye(4)[2:], "mse")) == pytest.approx(2)
    assert float(agreement_loss(x, -x, "mse")) == pytest.approx(4)
    assert float(agreement_loss(x, -x, "cosine")) == pytest.approx(2)


def test_mse_is_twice_the_cosine_distance_at_any_width() -> None:
    for width in (8, 512):
        a, b = unit(5, width), unit(5, width, seed=1)
        mse, cosine = agreement_loss(a, b, "mse"), agreement_loss(a, b, "cosine")
        assert float(mse) == pytest.approx(2 * float(cosine), rel=1e-5)


def test_infonce() -> None:
    a, b = unit(5, 8), unit(5, 8, seed=1)
    expected = dense_clip(a, b, 1 / 0.07)
    assert float(agreement_loss(a, b, "infonce")) == pytest.approx(expected, rel=1e-5)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="mse, cosine, infonce, relational"):
        agreement_loss(unit(2, 4), unit(2, 4), "l1")


def test_infonce_does_not_part_equal_texts() -> None:
    a, b, ids = unit(5, 8), unit(5, 8, seed=1), [0, 1, 0, 2, 1]
    expected = dense_clip(a, b, 1 / 0.07, ids)
    got = float(agreement_loss(a, b, "infonce", torch.tensor(ids)))
    assert got == pytest.approx(expected, rel=1e-5)
    assert got < float(agreement_loss(a, b, "infonce")) - 0.1


@pytest.mark.parametrize("ids", (list(range(5)), [0, 1, 0, 2, 1]))
def test_relational(ids: list[int]) -> None:
    a, b = unit(5, 8), unit(5, 6, seed=1)
    kept = ~np.equal.outer(ids, ids)
    p, q = (softmax(similarities(v, v, 1 / 0.07), kept) for v in (a, b))
    got = float(agreement_loss(a, b, "relational", torch.tensor(ids)))
    assert got == pytest.approx((mean_kl(p, q) + mean_kl(q, p)) / 2, rel=1e-5)


def test_relational_is_blind_to_a_rotation_and_to_texts_alone() -> None:
    a = unit(5, 8)
    turned = a @ torch.linalg.qr(unit(8, 8, seed=3))[0]
    assert float(agreement_loss(a, turned, "relational")) == pytest.approx(0, abs=1e-9)
    alone = torch.zeros(5, dtype=torch.int64)
    assert float(agreement_loss(a, unit(5, 8, seed=1), "relational", alone)) == 0


def test_relational_moves_both_experts() -> None:
    a, b = unit(5, 8).requires_grad_(), unit(5, 8, seed=1).requires_grad_()
    agreement_loss(a, b, "relational").backward()
    assert a.grad is not None and b.grad is not None
    for value in (a, b):
        with torch.no_grad():
            value -= 1e-3 * value.grad
    after = agreement_loss(a.detach(), b.detach(), "relational")
    assert float(after) < float(agreement_loss(unit(5, 8), unit(5, 8, seed=1), "relational"))


def test_texts_that_differ_in_case_and_spacing_are_equal() -> None:
    texts = ["Normal.", "heart failure", " normal. ", "Heart\nfailure", "tumour"]
    assert equal_texts(texts).tolist() == [0, 1, 0, 1, 2]
