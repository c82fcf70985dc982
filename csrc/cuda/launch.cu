#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>

#include "launch.h"

namespace m3bind::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// A function of the driver, without linking to it: there may be none where this is loaded.
Encode encode() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &result),
          "find cuTensorMapEncodeTiled in the driver");
    STD_TORCH_CHECK(
        result == cudaDriverEntryPointSuccess,
        "m3bind: this driver has no cuTensorMapEncodeTiled: CUDA 12 or newer is needed");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

}  // namespace

void check(cudaError_t found, const char* doing) {
  STD_TORCH_CHECK(found == cudaSuccess, "m3bind: could not ", doing, ": ",
                  cudaGetErrorString(found));
}

cudaStream_t stream_of(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

TensorMap describe(const Tensor& matrix, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.size(1)),
                               static_cast<cuuint64_t>(matrix.size(0))};
  // Of a single row torch keeps whatever stride it had.
  const int64_t stride = matrix.size(0) == 1 ? (matrix.size(1) + 7) / 8 * 8 : matrix.stride(0);
  const cuuint64_t row_bytes[1] = {2 * static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  STD_TORCH_CHECK(is_bf16(matrix) || matrix.scalar_type() == torch::headeronly::ScalarType::Half,
                  "m3bind: only bfloat16 and float16 are for Hopper's kernels");
  TensorMap map;
  const CUresult result = encode()(
      &map, is_bf16(matrix) ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      matrix.mutable_data_ptr(), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "m3bind: the driver refuses to describe a matrix of ",
                  sizes[1], " x ", sizes[0], ", rows of ", row_bytes[0], " bytes (CUresult ",
                  static_cast<int>(result), ")");
  return map;
}

int blocks_for(const Tensor& x, const Tensor& y) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles = 2 * ceil(x.size(0), kBlockRows) * ceil(y.size(0), kTileCols);
  STD_TORCH_CHECK(
      std::max({tiles, x.size(0), y.size(0)}) + (1 << 16) < std::numeric_limits<int>::max(),
      "m3bind: a matrix of ", x.size(0), " x ", y.size(0), " has too many tiles");
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                               x.get_device_index()),
        "count multiprocessors");
  return static_cast<int>(std::min<int64_t>(tiles / 2, multiprocessors));
}

Sizes sizes_of(const Tensor& x, const Tensor& y) {
  return {static_cast<int>(x.size(0)), static_cast<int>(y.size(0)), static_cast<int>(x.size(1))};
}

Numbers numbers_of(const OptionalTensor& row_class, const OptionalTensor& col_class,
                   const OptionalTensor& row_mask, const OptionalTensor& col_mask,
                   const OptionalTensor& row_class_ranges, const OptionalTensor& col_class_ranges,
                   const OptionalTensor& row_mask_ranges, const OptionalTensor& col_mask_ranges) {
  return {data_of<int>(row_class),        data_of<int>(col_class),
          data_of<int>(row_mask),         data_of<int>(col_mask),
          data_of<int>(row_class_ranges), data_of<int>(col_class_ranges),
          data_of<int>(row_mask_ranges),  data_of<int>(col_mask_ranges)};
}

bool is_bf16(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

}  // namespace m3bind::cuda
