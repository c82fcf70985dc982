"""`make gpu` and `m3bind results`: the record, what it verifies, and what is made of it."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m3bind import backends, verified

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# What the machine with the GPU lacks.
MISSING = (
    "typer", "rich", "open_clip", "hypothesis", "nvidia.dali", "omegaconf", "tqdm", "sklearn",
    "scipy", "timm", "transformers", "peft", "torchvision", "faiss", "inf_cl", "cut_cross_entropy",
    "torchmetrics", "matplotlib", "skimage", "PIL", "safetensors", "webdataset", "pydicom",
    "nibabel", "wfdb", "sentence_transformers",
)  # fmt: skip
BLOCKER = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in {MISSING!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a machine with torch, triton and pytest alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path}


def row(op: str = "clip_loss", backend: str = "triton", **changed) -> dict:
    searches = op in ("similarity_topk", "similarity_rank")
    primitive = backends.BUILT_ON[op]
    return {
        "op": op, "backend": backend, "n": 32768, "m": 32768, "d": 512, "dtype": "bf16",
        "pass": "forward" if searches else "both", "ms_median": 7.0, "ms_min": 6.5,
        "tflops": 600.0, "share_of_gemm": 0.8, "peak_mib": 200.0, "extra_mib": 100.0,
        "error": 0.004, "reference_error": 0.004, "error_rows": 4096, "deterministic": True,
        "rounds": 5, "setting": "bf16 features, fp32 logits", "problem": "",
        "sources": backends.installed_sources(primitive, backend), **changed,
    }  # fmt: skip


def group(backend: str = "triton", **changed) -> dict:
    return {
        "file": "test_on_device", "operator": "clip_loss", "backend": backend, "dtype": "bfloat16",
        "passed": 5, "failed": 0, "skipped": 0, "not finished": 0, "messages": [], **changed,
    }  # fmt: skip


@pytest.fixture
def kept() -> dict:
    rows = [row(), row(backend="chunked", tflops=300.0)]
    none = dict.fromkeys(
        ("ms_median", "ms_min", "tflops", "share_of_gemm", "peak_mib", "extra_mib", "error",
         "reference_error", "error_rows", "deterministic", "sources"),
    )  # fmt: skip
    absent = row(backend="inf-cl") | none | {"problem": "not run: inf-cl | does not import"}
    return {
        "device": "NVIDIA H100 80GB HBM3", "architecture": "sm_90", "driver": "580.1",
        "torch": "2.11", "triton": "3.6", "cuda": "13.0", "python": "3.12", "commit": "abc1234",
        "date": "2026-01-02", "mode": "full", "copy_tb_s": 3.0, "gemm_tflops": 780.0,
        "gemm_tflops_fp32": 50.0, "seconds": 400.0,
        "parts": [{"part": "tests", "outcome": "complete", "seconds": 1.0, "limit": 9.0,
                   "detail": "5 passed"}],
        "tests": [group(), group("chunked")],
        "sanitizer": [{"tool": "memcheck", "op": "clip_loss", "backend": "triton",
                       "outcome": "no errors"}],
        "loading": [{"modality": "all", "outcome": "not run: no nvidia.dali", "difference": None,
                     "bound": None, "samples_s": None, "samples_s_cpu": None}],
        "rows": [*rows, absent],
    }  # fmt: skip


# The record.


def test_a_record_has_every_key_in_its_form(load, kept):
    check = load("record").check
    assert check(json.loads(json.dumps(kept))) == kept
    for key in ("device", "driver", "torch", "triton", "cuda", "commit", "date", "copy_tb_s",
                "gemm_tflops", "rows"):  # fmt: skip
        with pytest.raises(ValueError, match=f"has no '{key}'"):
            check({name: value for name, value in kept.items() if name != key})
    for key in kept["rows"][0]:
        less = {name: value for name, value in kept["rows"][0].items() if name != key}
        with pytest.raises(ValueError, match=rf"rows\[0\] has no '{key}'"):
            check(kept | {"rows": [less]})
    for key, value in (("n", "32768"), ("tflops", "fast"), ("deterministic", 1), ("rounds", True)):
        with pytest.raises(ValueError, match=f"'{key}' is {value!r}"):
            check(kept | {"rows": [row(**{key: value})]})
    with pytest.raises(ValueError, match="'pass' is 'all'"):
        check(kept | {"rows": [row(**{"pass": "all"})]})


def test_what_did_not_run_has_no_figure(load, kept):
    check_row = load("record").check_row
    for changed in ({"problem": "not run: no CUDA"}, {"ms_median": None}):
        with pytest.raises(ValueError, match="either times or a 'problem'"):
            check_row("a row", row(**changed))


def test_the_outcome_of_a_test_replaces_that_it_was_not_finished(load):
    line = {"test": "a[x]", "file": "test_on_device", "operator": "clip_loss", "backend": "triton",
            "dtype": "torch.bfloat16"}  # fmt: skip
    lines = [
        line | {"outcome": "not finished"}, line | {"test": "b", "outcome": "not finished"},
        {"test": "a[x]", "outcome": "failed", "message": "off by 1"},
    ]  # fmt: skip
    (found,) = load("gpu").grouped(lines)
    assert (found["failed"], found["not finished"], found["passed"]) == (1, 1, 0)
    assert found["dtype"] == "bfloat16" and found["messages"] == ["a[x]: off by 1"]
    (kernels,) = load("gpu").grouped(
        [{"test": "c", "file": "test_triton_search", "outcome": "passed"}]
    )
    assert kernels["operator"] == "similarity_topk, similarity_rank"
    assert kernels["backend"] == "triton"


# The run.


def test_each_part_survives_the_failure_of_another(load, tmp_path):
    gpu = load("gpu")
    run = gpu.Run("cpu", "cpu", tmp_path / "work", tmp_path / "out", 100)

    def raises(limit):
        raise RuntimeError("no such driver")

    def dies(limit):
        step = gpu.Step("dies", [sys.executable, "-c", "import os; os.abort()"])
        return gpu.told(run.all_at_once([step], limit), "")

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
    gpu = load("gpu")
    run = gpu.Run("cpu", "cpu", tmp_path / "work", tmp_path / "out", 100)
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(6); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = gpu.Step("slow", [sys.executable, "-c", parent])
    start = time.perf_counter()
    with pytest.raises(gpu.Incomplete, match="past the limit: slow; so far"):
        gpu.told(run.all_at_once([step], 1.0), "so far")
    assert time.perf_counter() - start < 4
    time.sleep(6)
    assert not mark.exists()


def test_limits_add_up_to_the_whole_and_pass_on_what_is_left(load, tmp_path):
    gpu = load("gpu")
    assert gpu.SECONDS["full"] <= 8 * 60 and gpu.SECONDS["quick"] <= 2 * 60
    run = gpu.Run("cpu", "cpu", tmp_path / "work", tmp_path / "out", 100)
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
    gpu = load("gpu")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = gpu.Run("full", "cuda", tmp_path / "work", tmp_path / "out", 100)
    with pytest.raises(gpu.Incomplete, match="past the limit: racecheck-similarity_rank"):
        gpu.sanitizer(run)(4.0)
    found = {(s["tool"], s["op"]): s["outcome"] for s in run.record()["sanitizer"]}
    assert len(found) == 10
    assert found["memcheck", "similarity_topk"] == "errors: ========= ERROR SUMMARY: 2 errors"
    assert found["racecheck", "siglip_loss"] == "failed with 1: no kernel image"
    assert found["racecheck", "similarity_rank"] == "not finished"
    assert found["memcheck", "clip_loss"] == found["racecheck", "clip_loss"] == "no errors"


def test_only_a_full_run_on_a_gpu_is_a_result(load, tmp_path, monkeypatch):
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    for mode, architecture, recorded in (
        ("full", "sm_90", True), ("quick", "sm_90", False), ("cpu", "cpu", False),
    ):  # fmt: skip
        run = gpu.Run(mode, "cuda", tmp_path / mode, None, 100)
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
    files = [f"tests/kernels/test_triton_{n}.py" for n in ("stats", "siglip", "distill", "search")]
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["tests"][0].update(failed=1), "1 tests failed"),
        (lambda r: r["tests"][0].update({"not finished": 2}), "2 tests not finished"),
        (lambda r: r.update(tests=[]), "no test of it passed"),
        (lambda r: r["tests"].append(group(dtype="", failed=1)), "1 tests failed"),
        (lambda r: r["sanitizer"][0].update(outcome="errors: 1"), "memcheck: errors: 1"),
        (lambda r: r["rows"][0].update(error=0.0062), "error 0.0062 beside 0.004 at D=512"),
        (lambda r: r["rows"][0].update(error=float("nan")), "error nan beside 0.004"),
        (lambda r: r["rows"][0].update(error=None), "no error was measured"),
        (lambda r: r["rows"][0].update(deterministic=False), "two runs differ"),
        (lambda r: r["rows"].append(row() | {"ms_min": None, "ms_median": None,
                                             "problem": "failed: no memory"}), "failed: no memory"),
        (lambda r: r["rows"].pop(0), "not measured"),
        (lambda r: r["rows"].append(row(sources="0" * 16)), "its sources changed"),
        (lambda r: r.update(mode="quick"), "the run was quick"),
    ],
)  # fmt: skip
def test_nothing_is_verified_with_a_fault(load, kept, change, reason):
    verify = load("verify")
    assert verify.judge(kept, "clip_loss", "triton", "bf16").reasons == ()
    change(kept)
    reasons = verify.judge(kept, "clip_loss", "triton", "bf16").reasons
    assert any(reason in one for one in reasons), reasons
    assert "triton" not in verify.verified(kept).get("similarity_stats", {})


def test_other_dtypes_and_operators_are_judged_apart(load, kept):
    verify = load("verify")
    kept["tests"].append(group(dtype="float32", failed=1))
    kept["tests"].append(group(operator="siglip_loss", failed=1))
    found = verify.verified(kept)
    assert list(found) == ["similarity_stats"]
    assert list(found["similarity_stats"]["triton"]) == ["bf16"]


def test_speeds_are_compared_at_common_sizes(load, kept):
    kept["rows"].append(row(n=8192, m=8192, tflops=10.0))  # chunked was not measured there
    found = load("verify").verified(kept)["similarity_stats"]
    assert found["triton"]["bf16"]["tflops"] == 600 and found["chunked"]["bf16"]["tflops"] == 300


def test_backends_select_by_what_a_record_verifies(load, kept, monkeypatch):
    table = load("render").verified([kept])
    monkeypatch.setattr(verified, "table", lambda: json.loads(json.dumps(table)))
    monkeypatch.setattr(backends, "architectures", lambda: ("sm_90",))
    backends.verified_for.cache_clear()
    try:
        import torch

        assert backends.resolve("clip_loss", "cuda", torch.bfloat16) == "triton"
        assert backends.resolve("clip_loss", "cuda", torch.float32) == "chunked"
    finally:
        backends.verified_for.cache_clear()


def test_of_two_devices_of_an_architecture_the_later_one_counts(load, kept):
    later = json.loads(json.dumps(kept)) | {"device": "NVIDIA H200", "date": "2026-02-03"}
    later["tests"] = later["tests"][1:]  # none of triton
    found = load("render").verified([later, kept])["sm_90"]["similarity_stats"]
    assert not found["triton"]  # never its speed on one beside another's on the other
    assert found["chunked"]["bf16"]["device"] == "NVIDIA H200"


# What is made of it.


def test_the_pages_hold_what_is_recorded(load):
    for path, text in load("render").pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: m3bind results"


def test_a_verified_record_is_shown_with_device_commit_and_date(load, kept):
    render = load("render")
    text = render.performance([kept], None)
    where = "NVIDIA H100 80GB HBM3 (sm_90) at abc1234"
    assert "| `clip_loss` | triton | compiles for sm_80" in text
    assert f"verified on {where}: bf16 |" in text
    assert "driver 580.1" in text and "2026-01-02" in text and "80.0%" in text
    assert "not run: inf-cl \\| does not import" in text
    assert render.table.CHANGED + " |" not in text
    block = render.block([kept], None)
    assert "| NVIDIA H100 80GB HBM3 | clip_loss bf16 N=32768 M=32768 D=512 | triton |" in block


def test_rows_whose_kernels_have_changed_say_so(load, kept):
    render = load("render")
    kept["rows"][0]["sources"] = "0" * 16
    text = render.performance([kept], None)
    assert "kernels changed since verified on NVIDIA H100" in text
    (line,) = [ln for ln in text.splitlines() if ln.startswith("| triton | both |")]
    assert line.endswith("kernels changed since |")
    (line,) = [ln for ln in text.splitlines() if ln.startswith("| chunked | both |")]
    assert line.endswith("|  |")
    assert "kernels changed since" in render.block([kept], None)


def test_rows_of_the_cpu_say_so_too(load):
    render = load("render")
    cpu = render.recorded_cpu()
    for part in cpu["parts"].values():
        for one in part["rows"]:
            if one.get("sources"):
                one["sources"] = "0" * 16
    assert render.table.overview(cpu, render.is_current).count("; kernels changed since |") > 10


def test_what_ran_and_failed_is_not_called_not_yet_run(load, kept):
    render = load("render")
    kept["tests"][0]["failed"] = 1
    told = render.status([kept], "clip_loss", "triton")
    assert "bf16 not verified: 1 tests failed" in told and render.NOT_YET not in told
    assert render.status([kept], "siglip_loss", "chunked") == render.NOT_YET
    compiled = render.status([], "clip_loss", "triton")
    assert compiled.startswith("compiles for") and compiled.endswith(render.NOT_YET)
    assert "works" not in render.performance([kept], None).replace("whether a kernel works", "")


def test_the_block_replaces_only_what_is_between_its_markers(load):
    render = load("render")
    text = f"before\n{render.BEGIN}\nstale\n{render.END}\nafter\n"
    new = render.with_block(text, "fresh\n")
    assert new == f"before\n{render.BEGIN}\nfresh\n{render.END}\nafter\n"
    with pytest.raises(ValueError, match="put the two lines"):
        render.with_block("no markers", "fresh\n")


def test_the_command_needs_a_clone_and_no_toolkit(bare, tmp_path):
    command = [sys.executable, "-c", "from m3bind.cli import main; main()", "results"]
    code = (
        "import sys; from m3bind import results, resources; from pathlib import Path\n"
        f"results.PACKAGE = Path({str(tmp_path)!r}) / 'm3bind'\n"
        "sys.argv = ['m3bind', 'results']\n"
        "from m3bind.cli import main; main()"
    )
    done = subprocess.run([*command[:2], code], env=bare, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("m3bind: m3bind results needs a clone of the repository")
