"""A run of `make gpu`: processes with limits, and the record that is written after every part."""

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
# The tests of a file of kernels, and what they are about.
ABOUT = {
    "test_triton_stats": ("similarity_stats",),
    "test_triton_kept": ("similarity_stats",),
    "test_triton_kept_memory": ("similarity_stats",),
    "test_triton_siglip": ("siglip",),
    "test_triton_distill": ("similarity_distill",),
    "test_triton_search": ("similarity_topk", "similarity_rank"),
    "test_triton_forward_mode": ("similarity_stats", "siglip", "similarity_distill"),
}


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
