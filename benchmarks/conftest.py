"""Every benchmark runs on the threads that were asked for, and is timed in turns."""

from pathlib import Path

import pytest
import torch
from rows import replayed
from turns import THREADS


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=replayed))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)
