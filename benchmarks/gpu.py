"""The recorded run on a GPU: python benchmarks/gpu.py [--quick] [--device cpu] [--out FOLDER]

Builds, tests, watches memory, measures. Each part is a process, or several at once, with a time
limit of its own; whatever one of them does, the others run, and after each the record is written
anew: <FOLDER>/gpu.json and gpu.md, in benchmarks/results/<device> unless told. --quick takes two
minutes instead of eight and leaves the results alone, as does --device cpu, which goes the same way
where there is no GPU, at sizes that say nothing. `m3bind results` then renders what is recorded.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpu_run import ABOUT, BENCHMARKS, ROOT, Ended, Incomplete, Run, Step, grouped, told

SECONDS = {"full": 465, "quick": 112}  # of eight and two minutes
OPS = ("clip_loss", "siglip_loss", "similarity_distill", "similarity_topk",
                 "similarity_rank")  # fmt: skip
# What compute-sanitizer watches.
WATCHED = (*((op, "triton") for op in OPS),
           *((op, "cuda") for op in ("clip_loss", "siglip_loss", "similarity_topk")))  # fmt: skip
# Errors that calls of the driver return are torch's, which asks what there is.
SANITIZERS = {
    "memcheck": ("--tool", "memcheck", "--report-api-errors", "no"),
    "racecheck": ("--tool", "racecheck"),
}
KERNEL_TESTS = tuple(f"tests/kernels/{name}.py" for name in ABOUT)
DEVICE_TESTS = "tests/ops/test_on_device.py"
ERRORS_FOUND = 99
MOST_PROCESSES = 12  # each has a context on the GPU
STARTING = 8.0  # seconds that a process takes until it can measure


# Exits with 0 where the modules were built from these sources, for this torch.
IS_CURRENT = """
import sys
from pathlib import Path
import torch
from m3bind import backends, sources
wanted = {"cpp": backends.native()}
if sys.argv[1] != "cpu" and sources.of_native(Path(), "cuda") is not None:
    wanted["cuda"] = backends.native_cuda()
for backend, module in wanted.items():
    if getattr(module, "sources", None) != sources.of_native(Path(), backend):
        sys.exit(1)
sys.exit(backends.native().torch_headers != torch.__version__)
"""


# Without setuptools, whose age there is not ours to choose.
BUILD_NATIVE = """
import runpy, sys
from pathlib import Path
root = Path(sys.argv[1])
runpy.run_path(str(root / "setup.py"), run_name="native")["build_native"](root / "m3bind")
"""


# The parts. Each returns one line about what it did, or raises.


def build(run: Run) -> Callable[[float], str]:
    def work(limit: float) -> str:
        start = time.perf_counter()
        current = Step("current", [sys.executable, "-c", IS_CURRENT, run.device])
        how = "already there"
        if run.all_at_once([current], limit)["current"].code != 0:
            command = [sys.executable, "-c", BUILD_NATIVE, str(ROOT)]
            step = Step("build", command, {} if run.gpu else {"M3BIND_CUDA": "OFF"})
            told(run.all_at_once([step], limit - (time.perf_counter() - start)), "")
            how = "built"
        modules = sorted(path.name.partition(".")[0] for path in (ROOT / "m3bind").glob("*.so"))
        return f"{how}: {', '.join(modules)}" + ("" if "_C_cuda" in modules else "; no _C_cuda")

    return work


def facts(run: Run) -> Callable[[float], str]:
    def work(limit: float) -> str:
        ended = run.all_at_once([run.python("facts", "gpu_facts.py")], limit)
        told(ended, "")
        line = ended["facts"].output.read_text().strip().splitlines()[-1]
        run.facts = json.loads(line)
        (run.folder / "facts.json").write_text(line)
        return f"{run.facts['device']}, {run.facts['gemm_tflops']:.3g} TFLOP/s in bf16"

    return work


def tests(run: Run) -> Callable[[float], str]:
    def work(limit: float) -> str:
        files = [DEVICE_TESTS] if run.mode != "full" else [*KERNEL_TESTS, DEVICE_TESTS]
        chosen = {
            "full": [],
            "quick": ["-k", "error_against_float64"],
            "cpu": ["-k", "error_against_float64 and float32 and not 1000"],
        }[run.mode]
        number = min(MOST_PROCESSES, os.cpu_count() or 1)
        steps = [
            Step(
                f"tests-{i}",
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
                 *chosen, *files],
                {"M3BIND_TEST_PART": f"{i}/{number}",
                 "M3BIND_TEST_OUTCOMES": str(run.folder / f"tests-{i}.jsonl"),
                 "OMP_NUM_THREADS": "1", "M3BIND_SUPPORT_TABLE": ""},
            )
            for i in range(number)
        ]  # fmt: skip
        ended = run.all_at_once(steps, limit)
        groups = grouped(run.lines("tests-*.jsonl"))
        kinds = ("passed", "failed", "skipped", "not finished")
        counts = {kind: sum(group[kind] for group in groups) for kind in kinds}
        line = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        if not counts["passed"]:
            raise Incomplete(f"{line}; {next(iter(ended.values())).tail()}")
        return told(ended, line)

    return work


def warm(run: Run) -> Callable[[float], str]:
    """The compiler and the tuner, side by side, so that nothing later waits for them."""

    def work(limit: float) -> str:
        steps = [
            run.python(f"warm-{op}", "gpu_rows.py", op, "--plan", run.mode, "--warm",
                       "--rows", str(run.folder / "none"), "--seconds", str(limit))
            for op in OPS
        ]  # fmt: skip
        return told(run.all_at_once(steps, limit), "compiled and tuned")

    return work


def sanitizer(run: Run) -> Callable[[float], str]:
    def work(limit: float) -> str:
        tool = shutil.which("compute-sanitizer")
        names = tuple(SANITIZERS)
        if tool is None or not run.gpu:
            reason = "compute-sanitizer is not installed" if run.gpu else "it needs a GPU"
            found = [sanitized(name, *what, f"not run: {reason}")
                     for name in names for what in WATCHED]  # fmt: skip
            keep(run, found)
            return f"not run: {reason}"
        steps = [
            Step(
                f"{name}-{op}-{backend}",
                [tool, *options, "--error-exitcode", str(ERRORS_FOUND), sys.executable,
                 str(BENCHMARKS / "sanitized.py"), op, backend],
                # memcheck sees what lies beyond an allocation, not beyond a part of a pool.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for name, options in SANITIZERS.items() for op, backend in WATCHED
        ]  # fmt: skip
        ended = run.all_at_once(steps, limit)
        keep(run, [
            sanitized(name, op, backend, outcome_of(ended[f"{name}-{op}-{backend}"]))
            for name in names for op, backend in WATCHED
        ])  # fmt: skip
        return told(ended, "watched the kernels")

    return work


def sanitized(tool: str, op: str, backend: str, outcome: str) -> dict[str, str]:
    return {"tool": tool, "op": op, "backend": backend, "outcome": outcome}


def outcome_of(one: Ended) -> str:
    if one.code is None:
        return "not finished"
    if one.code == 0:
        return "no errors"
    kind = "errors" if one.code == ERRORS_FOUND else f"failed with {one.code}"
    return f"{kind}: {one.tail(2)}"


def keep(run: Run, lines: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "sanitizer.jsonl").write_text(text, encoding="utf-8")


def rows(run: Run, *what: str) -> Callable[[float], str]:
    """Of operators, with the options of gpu_rows.py."""

    def work(limit: float) -> str:
        name = "-".join(["rows", *(word.strip("-") for word in what)])
        file = run.folder / f"{name}.jsonl"
        step = run.python(
            name, "gpu_rows.py", *what, "--plan", run.mode, "--rows", str(file),
            "--facts", str(run.folder / "facts.json"),
            "--seconds", f"{max(limit / 2, limit - STARTING):.1f}",
        )  # fmt: skip
        ended = run.all_at_once([step], limit)
        found = run.lines(file.name)
        measured = sum(not row["problem"] for row in found)
        return told(ended, f"{measured} rows measured, {len(found) - measured} not run")

    return work


def loading(run: Run) -> Callable[[float], str]:
    def work(limit: float) -> str:
        file = run.folder / "loading.jsonl"
        ended = run.all_at_once([run.python("loading", "gpu_loading.py", str(file))], limit)
        outcomes = "; ".join(f"{r['modality']} {r['outcome']}" for r in run.lines(file.name))
        return told(ended, outcomes)

    return work


def plan_of(run: Run) -> dict[str, tuple[float, Callable[[float], str]]]:
    """Parts with their shares of the time, the most wanted first."""
    first = {"build": (95, build(run)), "facts": (15, facts(run)), "tests": (130, tests(run))}
    last = {"sanitizer": (40, sanitizer(run)), "loading": (20, loading(run))}
    if run.mode == "full":
        return (
            first
            | {
                "warm": (45, warm(run)),
                "clip_loss": (40, rows(run, "clip_loss")),
                "similarity_topk": (25, rows(run, "similarity_topk")),
                "siglip_loss": (25, rows(run, "siglip_loss")),
                "similarity_distill": (25, rows(run, "similarity_distill")),
                "similarity_rank": (15, rows(run, "similarity_rank")),
                "large": (35, rows(run, "clip_loss", "--large")),
            }
            | last
        )
    # In one process, which starts once; the case that nobody can hold needs more than a quick run.
    large = {"large": (15, rows(run, "clip_loss", "--large"))} if run.mode == "cpu" else {}
    return first | {"warm": (45, warm(run)), "rows": (120, rows(run, *OPS))} | large | last


def has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not (torch.version.cuda and torch.cuda.is_available()))"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two minutes; no committed result")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="where gpu.json and gpu.md are written")
    parser.add_argument("--parts", help="only these, separated by commas")
    given = parser.parse_args()
    mode = "cpu" if given.device == "cpu" else "quick" if given.quick else "full"
    if given.device != "cpu" and not has_gpu():
        sys.exit(
            "make gpu: torch finds no NVIDIA GPU here; DEVICE=cpu goes the same way without one, "
            "at sizes that say nothing"
        )
    seconds = SECONDS["quick" if given.quick else "full"]
    run = Run(mode, given.device, ROOT / "build" / f"gpu-{mode}", given.out, seconds)
    plan = plan_of(run)
    chosen = given.parts.split(",") if given.parts else list(plan)
    if unknown := set(chosen) - set(plan):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(plan)}")
    run.all_parts({name: plan[name] for name in chosen})
    print(f"{time.perf_counter() - run.start:.0f} s; {run.out or run.folder}; m3bind results")
    if bad := [part["part"] for part in run.parts if part["outcome"] != "complete"]:
        sys.exit(f"kept, but not complete: {', '.join(bad)}")


if __name__ == "__main__":
    main()
