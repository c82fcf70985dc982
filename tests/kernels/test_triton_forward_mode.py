"""Forward mode by way of the Triton kernels' backward passes, against float64.

On the CPU under the interpreter (see test_triton_interpreter.py), on a GPU where there is one.
"""

import pytest
import torch
from crossed import crossed
from test_forward_mode import EACH, check_moves
from test_triton_stats import DEVICE, DTYPES, poisoned_memory  # noqa: F401


@pytest.mark.parametrize(("loss", "dtype"), crossed(tuple(EACH), DTYPES), ids=str)
def test_moves(loss, dtype):
    check_moves(loss, "triton", 20.0, 1.0, dtype, DEVICE)


@pytest.mark.parametrize("loss", EACH)
def test_no_scale(loss):
    check_moves(loss, "triton", 0.0, 1.0, torch.float32, DEVICE)
