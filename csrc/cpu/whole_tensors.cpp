#include "whole_tensors.h"

#include <torch/headeronly/core/ScalarType.h>

#include "panel.h"

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

void multiply(const Tensor& t, double factor) {
  float* data = static_cast<float*>(t.mutable_data_ptr());
  const int64_t cols = t.size(1);
  for_row_blocks(t.size(0), [&](int64_t begin, int64_t end) {
    row_kernels().multiply(data + begin * cols, (end - begin) * cols, static_cast<float>(factor));
  });
}

}  // namespace m3bind::cpu
