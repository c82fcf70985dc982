"""Outcomes of tests, a line each, for `make gpu`: M3BIND_TEST_OUTCOMES names the file.

Every test that was collected has a line "not finished" first, which its outcome replaces: a process
that dies hides none. M3BIND_TEST_PART=2/8 runs the tests of one of eight processes.
"""

import json
import os
from typing import Any

import pytest

# What a test is about, of its parameters.
FACTS = ("operator", "backend", "dtype")


def write(**line: Any) -> None:
    if path := os.environ.get("M3BIND_TEST_OUTCOMES"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)  # what -k and -m leave out is not collected
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    part = os.environ.get("M3BIND_TEST_PART")
    if part:
        mine, number = (int(word) for word in part.split("/"))
        # Neighbours together: they want the same kernels compiled.
        items[:] = items[mine * len(items) // number : (mine + 1) * len(items) // number]
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        facts = {name: str(given[name]) for name in FACTS if name in given}
        write(test=item.nodeid, file=item.path.stem, outcome="not finished", **facts)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        line = str(report.longrepr).strip().splitlines()[-1:] if report.longrepr else []
        write(test=report.nodeid, outcome=report.outcome, message="".join(line)[:300])
