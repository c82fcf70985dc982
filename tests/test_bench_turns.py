"""Benchmarks: who fails ends no run and gets a row, and what memory a call is said to take."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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


def test_a_brief_call_is_the_second_of_its_turn(turns, monkeypatch):
    """Whoever came before has taken the caches from the first."""
    clock, order = [0.0], []
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])

    def play(name: str, seconds: float):
        clock[0] += seconds if order[-1:] == [name] else 0.004 + seconds
        order.append(name)

    taken = turns.in_turns(
        {
            name: lambda name=name, s=s: turns.Contestant(run=lambda: play(name, s), setting="")
            for name, s in (("brief", 0.001), ("long", 0.02))
        },
        seconds=0.0,
        least=3,
    )
    assert taken["brief"].seconds == pytest.approx([0.001] * 3)
    assert taken["long"].seconds == pytest.approx([0.024, 0.02, 0.024])
    brief = ["brief", "brief"]
    assert order[2:] == [*brief, "long", "long", *brief, *brief, "long"]


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
    """Of 16 MiB at N=2048, open_clip holds several matrices, m3bind one within its budget."""
    command = [sys.executable, str(BENCHMARKS / "cold.py")]

    def extra(name):
        done = subprocess.run(
            [*command, name, "fp32", "2048", "1"], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)["extra_mib"]

    assert 16 < extra("m3bind") < 48 < extra("open_clip") < 200


class PretendedEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def test_on_a_gpu_passes_are_timed_apart_and_memory_is_the_peak_of_a_call(turns, monkeypatch):
    """The GPU is pretended: what is asked of it, and what is made of the answers."""
    x = torch.ones(256, 4)
    allocated = {"now": 100 << 20, "peak": 0}
    monkeypatch.setattr(turns, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "Event", PretendedEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated["now"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: allocated.update(peak=allocated["now"])
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated["peak"])

    def loss(x):
        allocated["peak"] = allocated["now"] + (7 << 20) + x.numel() * x.element_size()
        time.sleep(0.02)
        return x.square().sum()

    taken = turns.in_turns({"one": lambda: turns.passes(loss, [x])}, seconds=0.0)["one"]
    assert taken.problem == "" and len(taken.seconds) == len(taken.laps) == 3
    for whole, (forward, backward) in zip(taken.seconds, taken.laps, strict=True):
        assert forward > 0.015 > backward and whole == forward + backward
    assert taken.extra_mib == 7  # without the gradient, which is what the call returns
