// What operators do with whole tensors beside their products.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace m3bind::cpu {

using torch::stable::Tensor;

// The values of a tensor of any floating dtype.
std::vector<double> read(const Tensor& t);

// A float32 tensor of no dimension, beside `like`.
Tensor number(const Tensor& like, double value);

}  // namespace m3bind::cpu
