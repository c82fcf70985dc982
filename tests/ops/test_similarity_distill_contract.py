"""What is particular to similarity_distill: own shifts at any threads, and very many pairs."""

import pytest
import torch
from clip_oracle import errors, needs_native
from distill_oracle import features, run, truth

from m3bind.ops import similarity_distill


@needs_native
@pytest.mark.parametrize("scale", (30.0, 3000.0), ids=("", "own shifts"))
@pytest.mark.parametrize("n", (100, 1500), ids=("one block and a bit", "two panels"))
def test_bit_equal_from_run_to_run_and_for_any_threads(n, scale):
    given = features(n, 300, 64, 32, seed=0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(similarity_distill, given, scale, 20.0, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@needs_native
@pytest.mark.slow
def test_more_than_two_to_the_31_pairs():
    # Every feature vector is there many times: the softmax divides by that, the divergence stays.
    small = features(8, 8, 3, 4, seed=0)
    n, m = 46400, 46352
    assert n * m > 2**31
    large = tuple(t.repeat(k // 8, 1) for t, k in zip(small, (n, m, n, m), strict=True))
    want, got = truth(small, 5.0, 9.0), run(similarity_distill, large, 5.0, 9.0, backend="cpp")
    got["x"], got["y"] = got["x"][-8:] * (n // 8), got["y"][-8:] * (m // 8)
    found = errors(got, want)
    assert found["loss"] < 1e-6 and found["scale"] < 1e-5
    # Each is a float32 sum of 46 thousand terms, few of them different, that cancel.
    assert found["x"] < 1e-3 and found["y"] < 1e-3
