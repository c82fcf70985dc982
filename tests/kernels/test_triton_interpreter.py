"""Runs the tests of the Triton kernels on the CPU, in a process where Triton interprets them."""

import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


KERNELS = ("stats", "kept", "siglip", "distill", "search", "forward_mode")


def run_interpreted(kernels: Iterable[str], *options: str) -> None:
    files = {kernel: sorted(FOLDER.glob(f"test_triton_{kernel}*.py")) for kernel in kernels}
    assert all(files.values())
    path = os.pathsep.join((str(FOLDER), os.environ.get("PYTHONPATH", "")))  # for plugins
    changed = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--maxfail=5", *options, *chain(*files.values())],
        env=os.environ | changed,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_kernels_under_the_interpreter():
    run_interpreted(KERNELS, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_case_under_the_interpreter(kernel):
    run_interpreted([kernel], "-m", "slow")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_with_the_tiles_of_a_gpu(kernel):
    run_interpreted([kernel], "-p", "gpu_tiles")
