"""No operator reads memory that it did not write, though the padding of its products may."""

import os
import shutil
import subprocess
import sys

import pytest
from clip_oracle import needs_native

# All that C++ and torch allocate holds NaN, in float32 and in bfloat16.
ALLOCATE_NAN = """
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>
static void* filled(void* p, size_t size) { return p ? std::memset(p, 0xff, size) : nullptr; }
void* operator new(size_t size) {
  if (void* p = filled(std::malloc(size), size)) return p;
  throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
static void* aligned(size_t size, size_t alignment) {
  return filled(aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment), size);
}
void* operator new(size_t size, std::align_val_t alignment) {
  if (void* p = aligned(size, static_cast<size_t>(alignment))) return p;
  throw std::bad_alloc();
}
extern "C" int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = aligned(size, alignment);
  return *out || !size ? 0 : 12;
}
extern "C" void* mmap(void* at, size_t size, int access, int flags, int file, off_t offset) {
  void* p = reinterpret_cast<void*>(syscall(SYS_mmap, at, size, access, flags, file, offset));
  const bool memory = (flags & MAP_ANONYMOUS) && (access & PROT_WRITE) && size >= 4 << 20;
  return memory && p != MAP_FAILED ? filled(p, size) : p;
}
"""

LOSSES = """
import torch
from m3bind.ops import clip_loss, siglip_loss, similarity_distill
assert torch.empty(1000).isnan().all(), "the memory is not filled"
scale = torch.tensor(20.0)
losses = {
    "clip": lambda x, y, b: clip_loss(x, y, scale, backend=b),
    "nothing kept": lambda x, y, b: clip_loss(x, y, scale, memory_budget=0, backend=b),
    "one way": lambda x, y, b: clip_loss(x, y, scale, directions="rows", backend=b),
    "smooth": lambda x, y, b: clip_loss(x, y, scale, label_smoothing=0.1, backend=b),
    "siglip": lambda x, y, b: siglip_loss(x, y, scale, torch.tensor(-10.0), backend=b),
    "distill": lambda x, y, b: similarity_distill(
        x, y, scale, y.detach()[: len(x)], y.detach().flip(1), 9.0, backend=b),
}
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for n, m, d in ((129, 131, 37), (256, 256, 64), (601, 2100, 300)):
        torch.manual_seed(n)
        pair = [torch.nn.functional.normalize(torch.randn(k, d), dim=1).to(dtype) for k in (n, m)]
        for name, loss in losses.items():
            grads = []
            for backend in ("cpp", "reference"):
                x, y = (t.clone().requires_grad_() for t in pair)
                value = loss(x, y, backend)
                value.backward()
                grads.append([value.detach(), x.grad.float(), y.grad.float()])
            for got, want in zip(*grads):
                assert (got - want).norm() <= bound * want.norm(), (name, dtype, n, m, d)
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
def test_memory_full_of_nan(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "nan.cpp", tmp_path / "nan.so"
    source.write_text(ALLOCATE_NAN)
    subprocess.run([*compiler.split(), "-shared", "-fPIC", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOSSES],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
