"""The model of scale: bytes as they are counted, and what must hold between its figures."""

import importlib
import sys
from pathlib import Path

import pytest
from test_bytes import expected
from test_losses_over_ranks import D

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
model = importlib.import_module("scale_model")
RATES = model.Rates(flops=1e11, pairs=1e9, link=1e9, latency=1e-5, call=1e-3)


@pytest.mark.parametrize("loss", ("clip_loss", "siglip_loss"))
@pytest.mark.parametrize("size", (2, 4))
def test_bytes_are_those_that_are_counted(loss, size):
    """Features and their gradients: statistics are left out."""
    rows, ranks = [6, 6, 6], 3
    counted = expected(loss, "circulate", rows, rows, size, 0)["ring"]
    assert model.predict(loss, "circulate", 18, ranks, D, size, RATES).sent == counted
    both = [expected(loss, "gather", rows, [n, n, n], size, 0)["gather"] for n in (6, 7)]
    carried = 0 if loss == "siglip_loss" else 4 * 8
    of_a_row = (both[1] - both[0]) / (ranks - 1) - carried
    sent = model.predict(loss, "gather", 18, ranks, D, size, RATES).sent
    assert sent == (ranks - 1) * 12 * of_a_row


def test_ranks_divide_the_work_of_one():
    for loss, products in (("clip_loss", 4), ("siglip_loss", 3)):
        alone = model.predict(loss, "gather", 4096, 1, 512, 4, RATES)
        flops = products * 2 * 4096**2 * 512
        passes = 2 if loss == "clip_loss" else 1
        assert alone.compute == pytest.approx(flops / 1e11 + passes * 4096**2 / 1e9)
        shared = model.predict(loss, "circulate", 4096, 8, 512, 4, RATES)
        assert shared.compute == pytest.approx(alone.compute / 8)
        gathered = model.predict(loss, "gather", 4096, 8, 512, 4, RATES)
        assert gathered.compute > shared.compute and gathered.sent < shared.sent
        assert gathered.memory > 3 * shared.memory


def test_a_link_without_end_leaves_the_computing():
    endless = model.Rates(flops=1e11, pairs=1e9, link=1e30, latency=0, call=0)
    for scheme in ("gather", "circulate"):
        cost = model.predict("clip_loss", scheme, 4096, 8, 512, 4, endless)
        assert cost.seconds == pytest.approx(cost.compute)
