"""The recorded run: python benchmarks/run.py [--quick] [parts...]; without parts, all of them.

Each part is pytest in a process of its own; what it found is kept row by row in build/bench, even
if it dies. A part that is run again replaces what it found before. Then results/cpu.json, cpu.md
and what `m3bind results` renders are written; --quick uses small sizes, keeps what it finds in
build/bench-quick and leaves those three alone.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import render
import table
import torch

from m3bind.dtypes import multiplies_bf16

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
PACKAGES = ("torch", "triton", "open_clip_torch", "faiss-cpu", "inf-cl", "cut-cross-entropy")
BUSY = 0.1  # share of the machine that others use, above which figures are not worth much


@dataclass(frozen=True)
class Part:
    file: str
    settings: dict[str, str] = field(default_factory=dict)
    select: str = ""  # pytest's -k


PARTS = {
    "small": Part("bench_clip.py", {"SIZES": "48,256,1024"}),
    "clip": Part("bench_clip.py", {"SIZES": "4096,8192", "SECONDS": "30"}),
    "siglip-small": Part("bench_siglip.py", {"SIZES": "48,256,1024"}),
    "siglip": Part(
        "bench_siglip.py", {"SIZES": "4096,8192", "DTYPES": "fp32,bf16", "SECONDS": "20"}
    ),
    "distill": Part("bench_distill.py", {"SIZES": "1024,4096", "SECONDS": "20"}),
    "error": Part("bench_error.py", {"SIZES": "4096"}),
    "memory": Part("bench_memory.py", {"SIZES": "8192"}, "cold_memory"),
    "threads": Part("bench_threads.py", {"SIZES": "8192"}),
    "topk": Part("bench_topk.py", {"TOPK": "4096x1000000x512"}),
    "large": Part("bench_memory.py", {"LARGE": "65536"}, "large"),
    "distributed": Part("bench_distributed.py", {"SIZES": "4096", "SECONDS": "20"}),
    "import": Part("bench_import.py"),
}
QUICK = {"SIZES": "48,256", "TOPK": "64x4096x64", "LARGE": "1024", "SECONDS": "0.5"}


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def today() -> str:
    return datetime.date.today().isoformat()


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    bf16 = "with" if multiplies_bf16("auto", torch.device("cpu")) else "without"
    brand = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": brand[0] if brand else platform.machine(),
        "cores": os.cpu_count(),
        "capability": f"{torch.backends.cpu.get_cpu_capability()}, {bf16} bfloat16 products",
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def commit() -> str:
    """Of this checkout; a copy without its history is told by M3BIND_COMMIT."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # What an earlier part of the same recording wrote is no change of what is measured.
        written = (":!README.md", ":!docs/performance.md", ":!benchmarks/results")
        changed = git("status", "--porcelain", "-uno", "--", ".", *written)
        return git("rev-parse", "--short=9", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("M3BIND_COMMIT", "unknown")


def busy(seconds: float = 2.0) -> float:
    """The share of all cores' time that others use just now."""

    def times() -> tuple[int, int]:
        cpu = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(cpu), cpu[3] + cpu[4]  # all; idle, waiting for a disk

    total, idle = times()
    time.sleep(seconds)
    later, later_idle = times()
    return 1 - (later_idle - idle) / (later - total)


def run(name: str, folder: Path, quick: bool) -> dict:
    part, rows, others = PARTS[name], folder / f"{name}.jsonl", busy()
    if others > BUSY:
        print(f"   the machine is not quiet: others use {others:.0%} of it", flush=True)
    rows.unlink(missing_ok=True)
    settings = part.settings | (QUICK if quick else {})
    environment = {**os.environ, "M3BIND_BENCH_ROWS": str(rows)}
    environment |= {f"M3BIND_BENCH_{key}": value for key, value in settings.items()}
    command = [sys.executable, "-m", "pytest", "-v", "--benchmark-only", "-k", part.select]
    command += ["--benchmark-columns=min,median,rounds", f"benchmarks/{part.file}"]
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    return {
        "commit": commit(),
        "date": today(),
        "busy": others,
        "seconds": time.perf_counter() - start,
        "outcome": "complete" if code == 0 else f"pytest ended with {code}",
        "settings": settings,
        "rows": [json.loads(line) for line in rows.read_text().splitlines()]
        if rows.is_file()
        else [],
    }


def write(kept: dict, target: Path) -> None:
    target.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(table.page(kept), encoding="utf-8")


def recorded(here: dict) -> dict:
    """The parts that are recorded of this machine and versions, perhaps from another clone."""
    if not table.RESULTS.is_file():
        return {}
    kept = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    return kept["parts"] if kept["machine"] == here else {}


def main(chosen: list[str], quick: bool) -> None:
    folder = BUILD / ("bench-quick" if quick else "bench")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for at, name in enumerate(chosen, 1):
        minutes = (time.perf_counter() - start) / 60
        print(f"\n== {name}: {at} of {len(chosen)}, after {minutes:.1f} min", flush=True)
        part = run(name, folder, quick)
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    here = machine()
    done = {name: folder / f"{name}.json" for name in PARTS}
    found = {name: json.loads(path.read_text()) for name, path in done.items() if path.is_file()}
    earlier = {} if quick else recorded(here)
    parts = {name: p for name in PARTS if (p := found.get(name) or earlier.get(name))}
    kept = {"machine": here, "parts": parts}
    write(kept, folder / "cpu")
    if not quick:
        write(kept, table.RESULTS)
        render.main()
    print(f"\n{table.overview(kept)}\n{(time.perf_counter() - start) / 60:.1f} min")
    if failed := [name for name in chosen if parts[name]["outcome"] != "complete"]:
        sys.exit(f"kept, but not complete: {', '.join(failed)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, only to build/bench-quick"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    main(arguments.parts or list(PARTS), arguments.quick)
