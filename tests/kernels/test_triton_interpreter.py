"""Runs the tests of the Triton kernels on the CPU, in a process where Triton interprets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


KERNELS = ("stats", "kept", "siglip", "distill", "search")


def run_interpreted(marked: str, kernel: str, *options: str) -> None:
    files = sorted(FOLDER.glob(f"test_triton_{kernel}*.py"))
    path = os.pathsep.join((str(FOLDER), os.environ.get("PYTHONPATH", "")))  # for plugins
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", marked, *options, *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_under_the_interpreter(kernel):
    run_interpreted("not slow", kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_case_under_the_interpreter(kernel):
    run_interpreted("slow", kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_with_the_tiles_of_a_gpu(kernel):
    run_interpreted("slow or not slow", kernel, "-p", "gpu_tiles")  # there no case is slow
