"""Every benchmark runs on the threads that were asked for."""

import pytest
import torch
from turns import THREADS


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
