"""Groups of processes, one for each number of ranks, as long as the tests run."""

import sys
from pathlib import Path

import pytest
from pool import Ranks

sys.path.append(str(Path(__file__).parents[1] / "ops"))


@pytest.fixture(scope="session")
def pools():
    made: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        if size in made and made[size].broken:
            made.pop(size).close()
        if size not in made:
            made[size] = Ranks(size)
        return made[size]

    yield of
    for pool in made.values():
        pool.close()
