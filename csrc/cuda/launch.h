// What starts a kernel: torch's stream, descriptors of matrices for the copy engine, checks.
// Nothing is copied to the host, no memory is allocated and no other stream is used, so that calls
// can be captured in a CUDA graph.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "tile.h"

namespace m3bind::cuda {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(cudaError_t found, const char* doing);

// The current stream of torch on a device.
cudaStream_t stream_of(const Tensor& like);

// A matrix of 16-bit numbers, of which boxes of `box_rows` x 64 are copied.
TensorMap describe(const Tensor& matrix, int box_rows);

// One block a multiprocessor, for so many blocks of a matrix. Raises where they are too many.
int blocks_for(const Tensor& x, const Tensor& y);

Sizes sizes_of(const Tensor& x, const Tensor& y);

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* data_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// Classes, masks and their extremes, as all operators take them.
Numbers numbers_of(const OptionalTensor& row_class, const OptionalTensor& col_class,
                   const OptionalTensor& row_mask, const OptionalTensor& col_mask,
                   const OptionalTensor& row_class_ranges, const OptionalTensor& col_class_ranges,
                   const OptionalTensor& row_mask_ranges, const OptionalTensor& col_mask_ranges);

bool is_bf16(const Tensor& x);

template <class... Parameters, class... Given>
void launch(void (*kernel)(Parameters...), int shared, int blocks, const Tensor& like,
            const Given&... given) {
  const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(kernel, limit, shared), "ask for shared memory");
  kernel<<<blocks, kThreads, shared, stream_of(like)>>>(given...);
  check(cudaGetLastError(), "start a kernel");
}

// Dynamic shared memory, aligned as the copy engine's swizzle wants it.
__device__ inline char* aligned_shared() {
  extern __shared__ char memory[];
  return memory + (1024 - shared_address(memory) % 1024) % 1024;
}

}  // namespace m3bind::cuda
