"""`import m3bind` beside `import torch`, each in a fresh interpreter with warm page cache."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["torch", "m3bind"])
@pytest.mark.benchmark(group="import")
def test_import(benchmark, module):
    command = [sys.executable, "-c", f"import {module}"]
    benchmark.pedantic(
        subprocess.run, (command,), {"check": True}, rounds=7, warmup_rounds=1, iterations=1
    )
