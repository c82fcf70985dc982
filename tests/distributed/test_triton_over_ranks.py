"""Triton's kernels over ranks, each of which interprets them, with powers kept of every panel."""

from typing import Any

import pytest
import torch
from cases import compute, parts
from pool import Ranks
from test_losses_over_ranks import SCHEMES, case_of, check


def with_kept_powers(*arguments: Any) -> dict[str, Any]:
    """Runs in each rank: `compute`, as for very large matrices of many features, and how often
    derivatives were made of kept powers."""
    import quick_interpreter  # noqa: F401

    from m3bind.ops import stats
    from m3bind_kernels import stats_bwd, stats_side, waves

    # For good: these processes are this test's own.
    stats.FEW_FEATURES = stats.FEW_PAIRS = 0
    stats_side.MOST_FEATURES = waves.PRECISE_PAIRS = 0
    calls = []
    kept_bwd_kernel = stats_bwd.kept_bwd_kernel

    def spied(*given):
        left, left_count = kept_bwd_kernel(*given)
        calls.append(len(left) - int(left_count))
        return left, left_count

    stats_bwd.kept_bwd_kernel = spied
    try:
        return compute(*arguments) | {"tiles": calls}
    finally:
        stats_bwd.kept_bwd_kernel = kept_bwd_kernel


@pytest.fixture(scope="module")
def interpreting():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = Ranks(2, how="spawn")
        yield pool
        pool.close()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_powers_are_kept(interpreting, scheme, dtype):
    case = case_of("clip_loss", [150, 135], [150, 140], dtype, memory_budget=50.0)
    how = {"scheme": scheme, "backend": "triton", **case.options}
    found = interpreting.run(with_kept_powers, [(*part, how) for part in parts(case)])
    check(case, found)
    assert all(sum(rank["tiles"]) > 2 for rank in found), [rank["tiles"] for rank in found]
