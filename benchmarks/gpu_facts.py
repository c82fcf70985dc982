"""What the device is, how fast it copies, and how fast its library multiplies: JSON on the output.

python benchmarks/gpu_facts.py
"""

import json
import platform
import shutil
import subprocess

import torch
from run import commit, today, version_of
from turns import DEVICE, timed

# Of random numbers: zeros and ones take less power, and run faster.
SIZES = {"bf16": (torch.bfloat16, 8192), "fp32": (torch.float32, 8192)}
CPU_SIZE = 256


def gemm_tflops(dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = [timed(lambda: torch.mm(a, b, out=out)) for _ in range(12)]
    return 2 * size**3 / min(times[2:]) / 1e12


def copy_tb_s(number: int) -> float:
    """Bytes that are read and bytes that are written, a second."""
    source = torch.randn(number, device=DEVICE)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * number * 4 / min(times[2:]) / 1e12


def driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout.split() or ["unknown"])[0]


def main() -> None:
    gpu = DEVICE != "cpu"
    assert not torch.backends.cuda.matmul.allow_tf32, "fp32 rows are true fp32"
    facts = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU: {platform.machine()}",
        "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability()) if gpu else "cpu",
        "driver": driver() if gpu else "none",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": commit(),
        "date": today(),
    }
    for name, (dtype, size) in SIZES.items():
        key = "gemm_tflops" if name == "bf16" else f"gemm_tflops_{name}"
        facts[key] = gemm_tflops(dtype, size if gpu else CPU_SIZE)
    facts["copy_tb_s"] = copy_tb_s((1 << 28) if gpu else (1 << 20))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
