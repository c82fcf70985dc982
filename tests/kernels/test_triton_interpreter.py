"""Runs the tests of the Triton kernels on the CPU, in a process where Triton interprets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


FILES = tuple(f"test_triton_{name}.py" for name in ("stats", "kept", "siglip", "distill", "search"))


def run_interpreted(marked: str, file: str, *options: str) -> str:
    path = os.pathsep.join((str(FOLDER), os.environ.get("PYTHONPATH", "")))  # for plugins
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", marked, *options, FOLDER / file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("file", FILES)
def test_kernels_under_the_interpreter(file):
    output = run_interpreted("not slow", file)
    assert " passed" in output and "skipped" not in output


@pytest.mark.slow
@pytest.mark.parametrize("file", ("test_triton_stats.py", "test_triton_distill.py"))
def test_every_case_under_the_interpreter(file):
    output = run_interpreted("slow", file)
    assert " passed" in output and "skipped" not in output


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels_with_the_tiles_of_a_gpu(file):
    output = run_interpreted("not slow", file, "-p", "gpu_tiles")
    assert " passed" in output and "skipped" not in output
