"""`import m3bind` beside `import torch`, each in a fresh interpreter with warm page cache."""

import subprocess
import sys
from functools import cache, partial

import pytest
from rows import report
from turns import Contestant, Taken, in_turns

MODULES = ("torch", "m3bind")


@cache
def turns() -> dict[str, Taken]:
    def contestant(module: str) -> Contestant:
        command = [sys.executable, "-c", f"import {module}"]
        return Contestant(
            run=lambda: subprocess.run(command, check=True), setting="a fresh interpreter"
        )

    return in_turns({module: partial(contestant, module) for module in MODULES})


@pytest.mark.parametrize("module", MODULES)
def test_import(benchmark, module):
    report(benchmark, "import", module, turns()[module], op="import", kind="time")
