"""One operator, forward and backward, on a small ragged matrix: for compute-sanitizer to watch.

python benchmarks/sanitized.py OP BACKEND
"""

import sys

import torch
from gpu_rows import computed, our_call
from jobs import JOBS
from turns import DEVICE

ROWS, COLUMNS, FEATURES = 252, 507, 123


def main(op: str, backend: str) -> None:
    job = JOBS[op]
    for dtype in ("bf16", "fp32"):
        columns = COLUMNS if job.gallery else ROWS
        inputs = job.inputs(ROWS, columns, FEATURES, dtype, 0)
        computed(our_call(job, op, backend, dtype), inputs)
    if DEVICE != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
