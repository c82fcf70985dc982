// What backward passes do with whole tensors beside their products.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace m3bind::cpu {

using torch::stable::Tensor;

// The values of a tensor of any floating dtype.
std::vector<double> read(const Tensor& t);

// t *= factor, a float32 matrix.
void multiply(const Tensor& t, double factor);

}  // namespace m3bind::cpu
