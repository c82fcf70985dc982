"""One operator, forward and backward, on small ragged matrices: for compute-sanitizer to watch.

python benchmarks/sanitized.py OP BACKEND
"""

import sys

import torch
from gpu_rows import computed, our_call
from jobs import JOBS
from turns import DEVICE

# (rows, columns of a gallery, features, dtype)
SMALL = ((252, 507, 123, "bf16"), (252, 507, 123, "fp32"))
# What fits Hopper's tiles: derivatives are rounded from 2^20 pairs on, of more than 256 features.
FITTING = ((1100, 1000, 264, "bf16"), (1100, 1000, 264, "fp16"))


def main(op: str, backend: str) -> None:
    job = JOBS[op]
    for rows, columns, features, dtype in FITTING if backend == "cuda" else SMALL:
        inputs = job.inputs(rows, columns if job.gallery else rows, features, dtype, 0)
        computed(our_call(job, op, backend, dtype), inputs)
    if DEVICE != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
