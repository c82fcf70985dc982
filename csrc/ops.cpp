// Schemas of the native operators, and the Python module that carries them. pybind11 gives build
// information only; tensors go through torch.ops.m3bind_native.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/info_nce.h"
#include "cpu/row_kernels.h"
#include "cpu/siglip.h"
#include "cpu/similarity_distill.h"
#include "cpu/similarity_search.h"
#include "cpu/similarity_stats.h"

STABLE_TORCH_LIBRARY(m3bind_native, m) {
  m.def(
      "similarity_stats_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_class,"
      " Tensor? col_class, Tensor? row_mask, Tensor? col_mask, float margin, bool totals,"
      " int kept_rows) -> (Tensor, Tensor, Tensor)");
  m.def(
      "similarity_stats_bwd(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_class,"
      " Tensor? col_class, Tensor? row_mask, Tensor? col_mask, float margin, bool totals,"
      " Tensor row_lse, Tensor col_lse, Tensor kept, Tensor grad_rows, Tensor grad_cols,"
      " bool need_x, bool need_y) -> (Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_fwd(Tensor x, Tensor y, Tensor logit_scale, float margin, bool mean,"
      " int kept_rows) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_bwd(Tensor x, Tensor y, Tensor logit_scale, float margin, bool mean, Tensor rows,"
      " Tensor cols, Tensor kept, Tensor grad, bool need_x, bool need_y)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_rows_fwd(Tensor x, Tensor y, Tensor logit_scale, float margin, bool mean,"
      " bool need_x, bool need_y) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "siglip_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? row_class,"
      " Tensor? col_class, Tensor? row_mask, Tensor? col_mask) -> Tensor");
  m.def(
      "siglip_bwd(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? row_class,"
      " Tensor? col_class, Tensor? row_mask, Tensor? col_mask, Tensor grad_rows, bool need_x,"
      " bool need_y) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "siglip_total_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias,"
      " Tensor? row_class, Tensor? col_class, Tensor? row_mask, Tensor? col_mask, bool mean,"
      " bool need_x, bool need_y) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_distill_fwd(Tensor x, Tensor y, Tensor logit_scale, Tensor teacher_x,"
      " Tensor teacher_y, Tensor teacher_scale, Tensor? row_mask, Tensor? col_mask, bool kl,"
      " int kept_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_distill_bwd(Tensor x, Tensor y, Tensor logit_scale, Tensor teacher_x,"
      " Tensor teacher_y, Tensor teacher_scale, Tensor? row_mask, Tensor? col_mask, Tensor row_lse,"
      " Tensor col_lse, Tensor kept, Tensor grad_rows, Tensor grad_cols, bool need_x, bool need_y)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "similarity_topk_fwd(Tensor queries, Tensor gallery, int k, Tensor? query_ids,"
      " Tensor? gallery_ids) -> (Tensor, Tensor)");
  m.def(
      "similarity_rank_fwd(Tensor queries, Tensor gallery, Tensor labels, Tensor? query_ids,"
      " Tensor? gallery_ids) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(m3bind_native, CPU, m) {
  m.impl("similarity_stats_fwd", TORCH_BOX(&m3bind::cpu::similarity_stats_fwd));
  m.impl("similarity_stats_bwd", TORCH_BOX(&m3bind::cpu::similarity_stats_bwd));
  m.impl("info_nce_fwd", TORCH_BOX(&m3bind::cpu::info_nce_fwd));
  m.impl("info_nce_bwd", TORCH_BOX(&m3bind::cpu::info_nce_bwd));
  m.impl("info_nce_rows_fwd", TORCH_BOX(&m3bind::cpu::info_nce_rows_fwd));
  m.impl("siglip_fwd", TORCH_BOX(&m3bind::cpu::siglip_fwd));
  m.impl("siglip_bwd", TORCH_BOX(&m3bind::cpu::siglip_bwd));
  m.impl("siglip_total_fwd", TORCH_BOX(&m3bind::cpu::siglip_total_fwd));
  m.impl("similarity_distill_fwd", TORCH_BOX(&m3bind::cpu::similarity_distill_fwd));
  m.impl("similarity_distill_bwd", TORCH_BOX(&m3bind::cpu::similarity_distill_bwd));
  m.impl("similarity_topk_fwd", TORCH_BOX(&m3bind::cpu::similarity_topk_fwd));
  m.impl("similarity_rank_fwd", TORCH_BOX(&m3bind::cpu::similarity_rank_fwd));
}

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = M3BIND_COMPILER;
  m.attr("torch_headers") = M3BIND_TORCH_VERSION;
  m.attr("torch_target") = "2.11";
  m.attr("sources") = M3BIND_SOURCES;  // m3bind/sources.py
  m.attr("cpu_capability") = m3bind::cpu::capability().name;
}
