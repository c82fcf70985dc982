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
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_page
import record

ROOT = Path(__file__).parents[1]
BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
SECONDS = {"full": 465, "quick": 112}  # of eight and two minutes
OPS = ("clip_loss", "siglip_loss", "similarity_distill", "similarity_topk",
                 "similarity_rank")  # fmt: skip
# Errors that calls of the driver return are torch's, which asks what there is.
SANITIZERS = {
    "memcheck": ("--tool", "memcheck", "--report-api-errors", "no"),
    "racecheck": ("--tool", "racecheck"),
}
KERNEL_TESTS = tuple(f"tests/kernels/test_triton_{name}.py"
                     for name in ("stats", "siglip", "distill", "search"))  # fmt: skip
DEVICE_TESTS = "tests/ops/test_on_device.py"
# The tests of a file of kernels, and what they are about.
ABOUT = {
    "test_triton_stats": ("similarity_stats",),
    "test_triton_siglip": ("siglip",),
    "test_triton_distill": ("similarity_distill",),
    "test_triton_search": ("similarity_topk", "similarity_rank"),
}
ERRORS_FOUND = 99
MOST_PROCESSES = 12  # each has a context on the GPU
STARTING = 8.0  # seconds that a process takes until it can measure


@dataclass
class Step:
    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Ended:
    code: int | None  # None: it ran past its limit
    output: Path

    def tail(self, lines: int = 3) -> str:
        text = self.output.read_text(encoding="utf-8", errors="replace").strip()
        return " / ".join(text.splitlines()[-lines:])[-600:]


class Run:
    def __init__(
        self, mode: str, device: str, folder: Path, out: Path | None, seconds: float
    ) -> None:
        self.mode, self.device, self.folder, self.out = mode, device, folder, out
        self.seconds = seconds
        self.start = time.perf_counter()
        self.parts: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    def python(self, name: str, script: str, *arguments: str, **environment: str) -> Step:
        return Step(name, [sys.executable, str(BENCHMARKS / script), *arguments], environment)

    def all_at_once(self, steps: Iterable[Step], limit: float) -> dict[str, Ended]:
        """Runs processes side by side; none is left when this returns."""
        path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        common = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "M3BIND_BENCH_DEVICE": self.device, "M3BIND_TEST_DEVICE": self.device,
            # cuBLAS is deterministic only with a workspace of fixed size.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }  # fmt: skip
        end, running, ended = time.perf_counter() + limit, {}, {}
        for step in steps:
            output = self.folder / f"{step.name}.log"
            with output.open("wb") as file:
                running[step.name] = subprocess.Popen(
                    step.command, cwd=ROOT, env=common | step.environment, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            ended[step.name] = Ended(None, output)
        try:
            for name, process in running.items():
                with suppress(subprocess.TimeoutExpired):
                    ended[name].code = process.wait(max(0.1, end - time.perf_counter()))
        finally:
            for process in running.values():  # with all that it started
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return ended

    def lines(self, pattern: str) -> list[dict[str, Any]]:
        """JSON lines of files; what a killed process left half written is left out."""
        found = []
        for path in sorted(self.folder.glob(pattern)):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    print(f"{path.name}: half a line is left out", flush=True)
        return found

    def record(self) -> record.Record:
        unknown = dict.fromkeys(
            ("device", "architecture", "driver", "torch", "triton", "cuda", "python", "commit",
             "date"), "unknown",
        )  # fmt: skip
        rates = dict.fromkeys(("copy_tb_s", "gemm_tflops", "gemm_tflops_fp32"))
        return record.check({
            **unknown, **rates, **self.facts, "mode": self.mode,
            "seconds": time.perf_counter() - self.start, "parts": self.parts,
            "tests": grouped(self.lines("tests-*.jsonl")),
            "sanitizer": self.lines("sanitizer.jsonl"), "loading": self.lines("loading.jsonl"),
            "rows": self.lines("rows-*.jsonl"),
        })  # fmt: skip

    def write(self) -> None:
        found = self.record()
        default = self.folder
        if self.mode == "full" and found["architecture"].startswith("sm_"):
            default = RESULTS / slug(found["device"])
        folder = self.out or default
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("gpu.json", json.dumps(found, indent=1) + "\n"),
            ("gpu.md", gpu_page.page(found)),
        ):
            # Whole or not at all: the process may be killed at any time.
            (folder / f".{name}").write_text(text, encoding="utf-8")
            (folder / f".{name}").replace(folder / name)

    def part(self, name: str, work: Callable[[float], str], limit: float) -> None:
        """One part; what goes wrong in it is its outcome."""
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        start = time.perf_counter()
        try:
            detail, outcome = work(limit), "complete"
        except Incomplete as error:
            detail, outcome = str(error), "not complete"
        except Exception as error:
            detail, outcome = f"{type(error).__name__}: {error}", "failed"
        seconds = time.perf_counter() - start
        self.parts.append({
            "part": name, "outcome": outcome, "seconds": seconds, "limit": limit, "detail": detail,
        })  # fmt: skip
        print(f"   {outcome} after {seconds:.1f} s: {detail}", flush=True)
        try:
            self.write()
        except Exception as error:  # the lines in the folder are kept all the same
            print(f"   the record was not written: {type(error).__name__}: {error}", flush=True)

    def all_parts(self, plan: dict[str, tuple[float, Callable[[float], str]]]) -> None:
        """What one part does not use, the later ones have."""
        waiting = list(plan)
        while waiting:
            left = self.seconds - (time.perf_counter() - self.start)
            total = sum(plan[name][0] for name in waiting)
            weight, work = plan[name := waiting.pop(0)]
            self.part(name, work, max(1.0, left * weight / total))


class Incomplete(Exception):
    """A part that did not do all that it should, and what is missing."""


def told(ended: dict[str, Ended], what: str) -> str:
    late = [name for name, one in ended.items() if one.code is None]
    bad = [f"{name}: {one.tail()}" for name, one in ended.items() if one.code not in (0, None)]
    if late or bad:
        parts = ([f"past the limit: {', '.join(late)}"] if late else []) + bad
        raise Incomplete("; ".join([*parts, what]))
    return what


def slug(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3"""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def grouped(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outcomes of tests by file, operator, backend and dtype; later lines replace earlier ones."""
    tests: dict[str, dict[str, Any]] = {}
    for line in lines:
        tests.setdefault(line["test"], {}).update(line)
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for test in tests.values():
        file = test.get("file", "unknown")
        keys = (
            file, test.get("operator", ", ".join(ABOUT.get(file, ()))),
            test.get("backend", "triton" if file in ABOUT else ""),
            test.get("dtype", "").removeprefix("torch."),
        )  # fmt: skip
        empty = {"passed": 0, "failed": 0, "skipped": 0, "not finished": 0, "messages": []}
        group = groups.setdefault(keys, {**empty, "messages": []})
        group[test["outcome"]] += 1
        if test["outcome"] == "failed" and len(group["messages"]) < 3:
            group["messages"].append(f"{test['test']}: {test.get('message', '')}"[:400])
    names = ("file", "operator", "backend", "dtype")
    return [dict(zip(names, keys, strict=True)) | group for keys, group in sorted(groups.items())]


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


# The parts. Each returns one line about what it did, or raises.


def build(run: Run) -> Callable[[float], str]:
    def work(limit: float) -> str:
        start = time.perf_counter()
        current = Step("current", [sys.executable, "-c", IS_CURRENT, run.device])
        how = "already there"
        if run.all_at_once([current], limit)["current"].code != 0:
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
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
            found = [sanitized(name, op, "triton", f"not run: {reason}")
                     for name in names for op in OPS]  # fmt: skip
            keep(run, found)
            return f"not run: {reason}"
        steps = [
            Step(
                f"{name}-{op}",
                [tool, *options, "--error-exitcode", str(ERRORS_FOUND), sys.executable,
                 str(BENCHMARKS / "sanitized.py"), op, "triton"],
                # memcheck sees what lies beyond an allocation, not beyond a part of a pool.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for name, options in SANITIZERS.items() for op in OPS
        ]  # fmt: skip
        ended = run.all_at_once(steps, limit)
        keep(run, [
            sanitized(name, op, "triton", outcome_of(ended[f"{name}-{op}"]))
            for name in names for op in OPS
        ])  # fmt: skip
        return told(ended, "watched the Triton kernels")

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
