#include "whole_tensors.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace m3bind::cpu {

std::vector<double> read(const Tensor& t) {
  const Tensor converted = torch::stable::to(t, torch::headeronly::ScalarType::Double);
  const Tensor wide = torch::stable::contiguous(converted);
  const double* data = static_cast<const double*>(wide.const_data_ptr());
  return {data, data + wide.numel()};
}

Tensor number(const Tensor& like, double value) {
  Tensor out = torch::stable::new_empty(like, {}, torch::headeronly::ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

}  // namespace m3bind::cpu
