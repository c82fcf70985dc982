"""The table of `make bench`: what is demanded beside what is recorded."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("table")


@pytest.fixture
def kept():
    facts = {
        "group": "clip_loss bf16 N=4096", "op": "clip_loss", "kind": "time", "dtype": "bf16",
        "n": 4096, "threads": 1, "rounds": 5,
    }  # fmt: skip
    times = {"m3bind": 20.0, "open_clip": 50.0, "floor": 16.0}
    rows = [
        {**facts, "contestant": name, "setting": f"how {name} ran", "min_ms": ms, "median_ms": ms}
        for name, ms in times.items()
    ]
    rows.insert(2, {**facts, "contestant": "inf-cl", "setting": "", "problem": "not run: CUDA"})
    machine = {
        "cpu": "a processor", "cores": 2, "capability": "AVX2", "python": "3.11",
        "versions": {"torch": "2.15"},
    }  # fmt: skip
    part = {
        "commit": "abc", "date": "2026-01-01", "busy": 0.01, "seconds": 3.0, "outcome": "complete",
        "rows": rows,
    }  # fmt: skip
    return {"machine": machine, "parts": {"clip": part}}


def test_a_demand_is_judged_by_the_ratio_of_two_rows(table, kept):
    demand = table.Demand(
        what="of the floor", of="m3bind", over="floor", at_most=1.3,
        facts={"op": "clip_loss", "dtype": "bf16", "n": 4096},
    )  # fmt: skip
    rows = table.all_rows(kept)
    assert table.judged(rows, demand)[1:] == ("1.25x (20 / 16 ms)", "≤ 1.3x", "yes")
    rows[-1]["min_ms"] = 15.0
    assert table.judged(rows, demand)[3] == "no"
    rows[-1]["min_ms"] = 15.36  # rounded to three digits it would be what is demanded
    assert table.judged(rows, demand)[1:] == ("1.3021x (20 / 15.4 ms)", "≤ 1.3x", "no")


def test_what_was_not_measured_is_said_and_not_met(table, kept):
    demand = table.Demand(what="x", of="inf-cl", over="m3bind", at_least=1, facts={"n": 4096})
    assert table.judged(table.all_rows(kept), demand)[1:] == ("not run: CUDA", "≥ 1x", "no")
    missing = table.Demand(what="x", of="m3bind", facts={"n": 77})
    assert table.judged(table.all_rows(kept), missing)[1:] == ("not measured", "-", "-")


def test_the_page_has_the_overview_and_every_row_with_its_setting(table, kept):
    page = table.page(json.loads(json.dumps(kept)))
    assert table.overview(kept) in page
    assert "| m3bind | how m3bind ran | 1 | 20 | 20 | 5 | 1 | 1.25 |" in page
    assert "| open_clip | how open_clip ran | 1 | 50 | 50 | 5 | 2.5 | 3.12 |" in page
    assert "| inf-cl | - | 1 | not run: CUDA | - | - | - | - |" in page
