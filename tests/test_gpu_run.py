"""`make gpu`: parts with limits, what they leave, and the whole way without a GPU."""

import json
import os
import subprocess
import sys
import time

import pytest
import support_table
from gpu_cases import BENCHMARKS, ROOT, row


def test_the_outcome_of_a_test_replaces_that_it_was_not_finished(load):
    line = {"test": "a[x]", "file": "test_on_device", "operator": "clip_loss", "backend": "triton",
            "dtype": "torch.bfloat16"}  # fmt: skip
    lines = [
        line | {"outcome": "not finished"}, line | {"test": "b", "outcome": "not finished"},
        {"test": "a[x]", "outcome": "failed", "message": "off by 1"},
    ]  # fmt: skip
    (found,) = load("gpu_run").grouped(lines)
    assert (found["failed"], found["not finished"], found["passed"]) == (1, 1, 0)
    assert found["dtype"] == "bfloat16" and found["messages"] == ["a[x]: off by 1"]
    (kernels,) = load("gpu_run").grouped(
        [{"test": "c", "file": "test_triton_search", "outcome": "passed"}]
    )
    assert kernels["operator"] == "similarity_topk, similarity_rank"
    assert kernels["backend"] == "triton"


def test_all_tests_of_kernels_are_known(load):
    files = {path.stem for path in (ROOT / "tests" / "kernels").glob("test_triton_*.py")}
    others = {name for name in files if name.startswith("test_triton_compile")}
    kernels = files - others - {"test_triton_choice", "test_triton_interpreter"}
    assert set(load("gpu_run").ABOUT) == set(support_table.INTERPRETED) == kernels


# The run.


def test_each_part_survives_the_failure_of_another(load, tmp_path):
    gpu_run = load("gpu_run")
    run = gpu_run.Run("cpu", "cpu", tmp_path / "work", tmp_path / "out", 100)

    def raises(limit):
        raise RuntimeError("no such driver")

    def dies(limit):
        step = gpu_run.Step("dies", [sys.executable, "-c", "import os; os.abort()"])
        return gpu_run.told(run.all_at_once([step], limit), "")

    def leaves_half_a_line(limit):
        whole = json.dumps(row())
        (run.folder / "rows-x.jsonl").write_text(f"{whole}\n{whole[:50]}")
        return "one row"

    run.all_parts({"a": (1, raises), "b": (1, dies), "c": (1, leaves_half_a_line)})
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    outcomes = [(part["part"], part["outcome"]) for part in found["parts"]]
    assert outcomes == [("a", "failed"), ("b", "not complete"), ("c", "complete")]
    assert "no such driver" in found["parts"][0]["detail"]
    assert found["rows"] == [row()] and found["device"] == "unknown"
    assert "no such driver" in (tmp_path / "out" / "gpu.md").read_text()


def test_a_part_past_its_limit_is_ended_with_all_that_it_started(load, tmp_path):
    gpu_run = load("gpu_run")
    run = gpu_run.Run("cpu", "cpu", tmp_path / "work", tmp_path / "out", 100)
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(6); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = gpu_run.Step("slow", [sys.executable, "-c", parent])
    start = time.perf_counter()
    with pytest.raises(gpu_run.Incomplete, match="past the limit: slow; so far"):
        gpu_run.told(run.all_at_once([step], 1.0), "so far")
    assert time.perf_counter() - start < 4
    time.sleep(6)
    assert not mark.exists()


def test_limits_add_up_to_the_whole_and_pass_on_what_is_left(load, tmp_path):
    gpu, gpu_run = load("gpu"), load("gpu_run")
    assert gpu.SECONDS["full"] <= 8 * 60 and gpu.SECONDS["quick"] <= 2 * 60
    run = gpu_run.Run("cpu", "cpu", tmp_path / "work", tmp_path / "out", 100)
    limits = []
    run.all_parts({name: (weight, lambda limit: limits.append(limit) or "")
                   for name, weight in (("a", 3), ("b", 1))})  # fmt: skip
    assert limits[0] == pytest.approx(75, abs=2) and limits[1] == pytest.approx(100, abs=4)


FAKE_SANITIZER = """#!/bin/sh
case "$*" in
  *memcheck*similarity_topk*) echo "========= ERROR SUMMARY: 2 errors"; exit 99;;
  *racecheck*siglip_loss*) echo "no kernel image"; exit 1;;
  *racecheck*similarity_rank*) sleep 60;;
esac
"""


def test_what_the_sanitizer_reports_is_kept_by_operator(load, tmp_path, monkeypatch):
    gpu, gpu_run = load("gpu"), load("gpu_run")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = gpu_run.Run("full", "cuda", tmp_path / "work", tmp_path / "out", 100)
    with pytest.raises(gpu_run.Incomplete, match="past the limit: racecheck-similarity_rank"):
        gpu.sanitizer(run)(4.0)
    found = {(s["tool"], s["op"]): s["outcome"] for s in run.record()["sanitizer"]}
    assert len(found) == 10
    assert found["memcheck", "similarity_topk"] == "errors: ========= ERROR SUMMARY: 2 errors"
    assert found["racecheck", "siglip_loss"] == "failed with 1: no kernel image"
    assert found["racecheck", "similarity_rank"] == "not finished"
    assert found["memcheck", "clip_loss"] == found["racecheck", "clip_loss"] == "no errors"


def test_only_a_full_run_on_a_gpu_is_a_result(load, tmp_path, monkeypatch):
    gpu_run = load("gpu_run")
    monkeypatch.setattr(gpu_run, "RESULTS", tmp_path / "results")
    for mode, architecture, recorded in (
        ("full", "sm_90", True), ("quick", "sm_90", False), ("cpu", "cpu", False),
    ):  # fmt: skip
        run = gpu_run.Run(mode, "cuda", tmp_path / mode, None, 100)
        run.facts = {"device": f"NVIDIA {mode} (x)", "architecture": architecture}
        run.write()
        assert (tmp_path / "results" / f"nvidia-{mode}-x" / "gpu.json").is_file() == recorded


def test_the_whole_way_without_a_gpu_and_without_the_toolkit(load, tmp_path, bare):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--out", out, "--parts",
         "facts,tests,rows,large,sanitizer,loading"],
        cwd=ROOT, env=bare, capture_output=True, text=True,
    )  # fmt: skip
    found = load("record").check(json.loads((out / "gpu.json").read_text()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(part["outcome"] == "complete" for part in found["parts"])
    assert found["gemm_tflops"] > 0 and found["copy_tb_s"] > 0 and found["commit"] != "unknown"
    assert sum(group["passed"] for group in found["tests"]) > 20
    ours = [r for r in found["rows"] if r["backend"] == "chunked" and not r["problem"]]
    assert {r["pass"] for r in ours} == {"forward", "backward", "both"}
    assert {r["dtype"] for r in ours} == {"bf16", "fp32"}
    for one in ours:
        assert one["error"] <= 1.5 * one["reference_error"] + 1e-6 and one["deterministic"]
        assert one["ms_min"] <= one["ms_median"] and one["sources"]
    told = {r["backend"]: r["problem"] for r in found["rows"] if r["problem"]}
    assert told["open_clip"].startswith("not run: open_clip_torch does not import")
    assert told["inf-cl"] == told["cut-cross-entropy"] == "not run: needs CUDA"
    assert found["loading"][0]["outcome"].startswith("not run: No module named 'nvidia.dali'")
    assert {s["outcome"] for s in found["sanitizer"]} == {"not run: it needs a GPU"}
    # Nothing of it counts as verified.
    assert load("verify").verified(found) == {}


def test_the_tests_of_kernels_are_collected_without_the_toolkit(bare):
    """As on a GPU, but under the interpreter, for the GPU's own processes collect the same."""
    files = [f"tests/kernels/test_triton_{name}.py"
             for name in ("stats", "kept", "siglip", "distill", "search")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", *files],
        cwd=ROOT, env=bare | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert all(f"{file}::" in done.stdout for file in files)


def test_a_size_that_does_not_fit_the_time_has_a_row_that_says_so(load, tmp_path):
    rows = load("gpu_rows")
    plan = load("jobs").PLANS["cpu"]
    worker = rows.Worker("similarity_rank", plan, tmp_path / "rows", {}, 5.0)
    worker.speed["chunked", "bf16"] = 1.0
    worker.case("bf16", 96, 32, ["chunked"])
    (line,) = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert line["problem"] == "skipped: would not fit in the 5 s of this part"
    assert line["ms_min"] is None


# What is verified.
