"""`make gpu` and `m3bind results`: the record, what it verifies, and what is made of it."""

import json
import subprocess
import sys

import pytest
from gpu_cases import group, row

from m3bind import backends, verified


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["tests"][0].update(failed=1), "1 tests failed"),
        (lambda r: r["tests"][0].update({"not finished": 2}), "2 tests not finished"),
        (lambda r: r.update(tests=[]), "no test of it passed"),
        (lambda r: r["tests"].append(group(dtype="", failed=1)), "1 tests failed"),
        (lambda r: r["sanitizer"][0].update(outcome="errors: 1"), "memcheck: errors: 1"),
        (lambda r: r["sanitizer"][0].update(outcome="not finished"), "memcheck: not finished"),
        (lambda r: r["rows"][0].update(error=0.0062), "error 0.0062 beside 0.004 at D=512"),
        (lambda r: r["rows"][0].update(error=float("nan")), "error nan beside 0.004"),
        (lambda r: r["rows"][0].update(error=None), "no error was measured"),
        (lambda r: r["rows"].append(r["rows"][0] | {"backend": "triton, kept", "error": 0.0062}),
         "error 0.0062 beside 0.004 at D=512"),
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


def test_memory_is_no_speed_of_the_backend(load, kept):
    """What is faster with more memory does not choose the backend without it."""
    verify = load("verify")
    before = verify.verified(kept)
    faster = kept["rows"][0] | {"backend": "triton, kept", "tflops": 900.0, "ms_min": 4.0}
    lacking = faster | {"ms_min": None, "ms_median": None, "tflops": None}
    lacking["problem"] = "failed: OutOfMemoryError: tried to allocate 16 GiB"
    for more in (faster, lacking):
        kept["rows"].append(more)
        assert verify.verified(kept) == before


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
