"""Benchmarks: who fails ends no run and gets a row, and what memory a call is said to take."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("turns")


def test_who_is_missing_or_fails_leaves_the_others_alone(turns):
    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("cannot allocate\nmore lines")

    def missing():
        raise turns.NotRun("needs CUDA")

    taken = turns.in_turns(
        {
            "good": lambda: turns.Contestant(run=lambda: None, setting="as it is"),
            "missing": missing,
            "absent": lambda: turns.peer("no_such_module", "no-such-package"),
            "fails": lambda: turns.Contestant(run=fails_later, setting="often"),
        },
        seconds=0.0,
        least=4,
    )
    assert len(taken["good"].seconds) == 4 and taken["good"].problem == ""
    assert taken["missing"].problem == "not run: needs CUDA"
    assert taken["absent"].problem.startswith("not run: no-such-package does not import")
    assert taken["fails"].problem == "failed: RuntimeError: cannot allocate"
    assert taken["fails"].setting == "often" and taken["fails"].seconds == []


def test_who_did_not_run_has_a_row_that_says_why(turns, monkeypatch, tmp_path):
    monkeypatch.setenv("M3BIND_BENCH_ROWS", str(tmp_path / "rows.jsonl"))
    rows = importlib.import_module("rows")
    with pytest.raises(pytest.skip.Exception, match="needs CUDA"):
        rows.report(None, "a group", "inf-cl", turns.Taken(problem="not run: needs CUDA"), n=5)
    with pytest.raises(pytest.fail.Exception, match="cannot allocate"):
        rows.report(
            None, "a group", "open_clip", turns.Taken("eager", [], "failed: cannot allocate")
        )
    first, second = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (first["contestant"], first["problem"], first["n"]) == (
        "inf-cl",
        "not run: needs CUDA",
        5,
    )
    assert (second["setting"], second["problem"]) == ("eager", "failed: cannot allocate")


def test_memory_of_a_cold_call_counts_what_the_call_adds():
    """open_clip holds two matrices of 16 MiB at N=2048, m3bind none."""
    command = [sys.executable, str(BENCHMARKS / "cold.py")]

    def extra(name):
        done = subprocess.run(
            [*command, name, "fp32", "2048", "1"], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)["extra_mib"]

    assert 0 < extra("m3bind") < 32 < extra("open_clip") < 200
