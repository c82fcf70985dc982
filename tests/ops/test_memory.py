"""What backend cpp takes beside its inputs, as the system counts it."""

import subprocess
import sys
from pathlib import Path

import pytest
from clip_oracle import needs_native

COUNT = """
import sys
from pathlib import Path
import torch
from m3bind.ops import similarity_lse

rows, columns, features = map(int, sys.argv[1:])
torch.set_num_threads(1)

def mib(name):
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) / 1024

def run(n, m):
    x, y = torch.randn(n, features), torch.randn(m, features)
    def call():
        with torch.no_grad():
            similarity_lse(x, y, torch.tensor(1.0), backend="cpp")
    return call

run(rows, 2000)()  # code and libraries
call = run(rows, columns)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = mib("VmRSS")
call()
print(mib("VmHWM") - before)
"""


# The whole matrix and a copy of y would each take 59 MiB.
@needs_native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts by Linux' /proc")
def test_few_rows_take_neither_the_matrix_nor_a_copy_of_the_columns():
    done = subprocess.run(
        [sys.executable, "-c", COUNT, "256", "60000", "256"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20
