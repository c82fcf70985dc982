"""Runs interpreted_operator.py in a process where Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = HERE / "interpreted_operator.py"


@pytest.mark.parametrize("marked", ("not slow", pytest.param("slow", marks=pytest.mark.slow)))
def test_operators_on_emulated_blocks(marked):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", marked, TESTS],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
