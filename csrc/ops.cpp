// Schemas of the native operators, and the Python module that carries them. pybind11 gives build
// information only; tensors go through torch.ops.m3bind_native.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/row_kernels.h"
#include "cpu/similarity_stats.h"

STABLE_TORCH_LIBRARY(m3bind_native, m) {
  m.def(
      "similarity_stats_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_class,"
      " Tensor? col_class, Tensor? row_mask, Tensor? col_mask, float margin, bool totals)"
      " -> (Tensor, Tensor)");
  m.def(
      "similarity_stats_bwd(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_class,"
      " Tensor? col_class, Tensor? row_mask, Tensor? col_mask, float margin, bool totals,"
      " Tensor row_lse, Tensor col_lse, Tensor grad_rows, Tensor grad_cols, bool need_x,"
      " bool need_y) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(m3bind_native, CPU, m) {
  m.impl("similarity_stats_fwd", TORCH_BOX(&m3bind::cpu::similarity_stats_fwd));
  m.impl("similarity_stats_bwd", TORCH_BOX(&m3bind::cpu::similarity_stats_bwd));
}

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = M3BIND_COMPILER;
  m.attr("torch_headers") = M3BIND_TORCH_VERSION;
  m.attr("torch_target") = "2.11";
  m.attr("cpu_capability") = m3bind::cpu::capability().name;
}
