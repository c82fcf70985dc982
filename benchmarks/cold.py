"""One call in a fresh process, and its memory: python benchmarks/cold.py NAME DTYPE N THREADS

Prints JSON: seconds; extra_mib, the peak beyond what is there before the call (libraries, features)
and beyond the gradients that it returns; peak_mib, that of the whole process.
"""

import ctypes
import json
import sys
from pathlib import Path

import torch
from clip_contestants import PEERS, contestant
from turns import timed

MIB = 2**20


def status(key: str) -> int:
    """Bytes of VmRSS or VmHWM. Unlike getrusage's maximum, they know nothing of the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def settle() -> None:
    """Give freed memory back, and let the peak start from here."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(name: str, dtype: str, n: int, threads: int) -> None:
    torch.set_num_threads(threads)
    one = contestant(name, n, dtype)
    # Libraries that the peers load late, and the compiler, are not what their losses take. Our own
    # first call counts whole.
    if name == "torch.compile":
        one.run()
        one.setting += ", compiled before"
    elif name in PEERS:
        contestant(name, 8, dtype).run()
    whole = status("VmHWM")
    settle()
    before = status("VmRSS")
    found: list[torch.Tensor] = []
    seconds = timed(lambda: found.extend(one.run() or ()))
    peak = status("VmHWM")
    gradients = sum(g.numel() * g.element_size() for g in found)
    print(
        json.dumps(
            {
                "setting": one.setting,
                "seconds": seconds,
                "extra_mib": (peak - before - gradients) / MIB,
                "peak_mib": max(whole, peak) / MIB,
            }
        )
    )


if __name__ == "__main__":
    name, dtype, n, threads = sys.argv[1:]
    main(name, dtype, int(n), int(threads))
