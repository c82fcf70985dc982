// The operators of similarity_stats for CUDA: see kernels/m3bind_kernels/hopper.py.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include "flags.h"
#include "launch.h"
#include "stats_bwd.h"
#include "stats_fwd.h"

namespace m3bind::cuda {
namespace {

template <class Half, bool CLASSES, bool MASKS, bool TOTALS, bool KEEP>
__global__ void __launch_bounds__(kThreads, 1)
    stats_fwd_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
                     const __grid_constant__ TensorMap powers, const __grid_constant__ StatsFwd p) {
  stats_fwd<Half, CLASSES, MASKS, TOTALS, KEEP>(p, &x, &y, &powers, aligned_shared());
}

template <class Half, bool CLASSES, bool MASKS, bool TOTALS, bool APART>
__global__ void __launch_bounds__(kThreads, 1)
    stats_bwd_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
                     const __grid_constant__ TensorMap out, const __grid_constant__ StatsBwd p) {
  stats_bwd<Half, CLASSES, MASKS, TOTALS, APART>(p, &x, &y, &out, aligned_shared());
}

void stats_fwd_op(const Tensor& x, const Tensor& y, const Tensor& factor,
                  const OptionalTensor& row_class, const OptionalTensor& col_class,
                  const OptionalTensor& row_mask, const OptionalTensor& col_mask,
                  const OptionalTensor& row_class_ranges, const OptionalTensor& col_class_ranges,
                  const OptionalTensor& row_mask_ranges, const OptionalTensor& col_mask_ranges,
                  double margin, bool totals, const Tensor& row_parts, const Tensor& col_parts,
                  const Tensor& far, const OptionalTensor& powers, const OptionalTensor& shifts,
                  const OptionalTensor& kept_row_sums, const OptionalTensor& kept_col_sums) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const StatsFwd p{sizes_of(x, y),
                   numbers_of(row_class, col_class, row_mask, col_mask, row_class_ranges,
                              col_class_ranges, row_mask_ranges, col_mask_ranges),
                   data_of<float>(factor),
                   static_cast<float>(margin),
                   data_of<float>(row_parts),
                   data_of<float>(col_parts),
                   row_parts.stride(0),
                   col_parts.stride(0),
                   data_of<int>(far),
                   powers.has_value() ? static_cast<int>(powers->size(0)) : 0,
                   data_of<float>(shifts),
                   data_of<float>(kept_row_sums),
                   data_of<float>(kept_col_sums),
                   kept_row_sums.has_value() ? kept_row_sums->stride(1) : 0,
                   kept_row_sums.has_value() ? kept_row_sums->stride(0) : 0,
                   kept_col_sums.has_value() ? kept_col_sums->stride(0) : 0};
  const TensorMap x_map = describe(x, kBlockRows), y_map = describe(y, kTileCols);
  const TensorMap powers_map = powers.has_value() ? describe(*powers, kTileRows) : x_map;
  with_flags(
      [&]<bool BF16, bool C, bool M, bool T, bool K>(
          std::integer_sequence<bool, BF16, C, M, T, K>) {
        using Half = std::conditional_t<BF16, __nv_bfloat16, __half>;
        if constexpr (!(T && K))
          launch(stats_fwd_kernel<Half, C, M, T, K>, kStatsFwdShared<K>, blocks_for(x, y), x, x_map,
                 y_map, powers_map, p);
        else
          STD_TORCH_CHECK(false, "m3bind: nothing is kept where totals are wanted");
      },
      is_bf16(x), row_class.has_value(), row_mask.has_value(), totals, powers.has_value());
}

void stats_bwd_op(const Tensor& x, const Tensor& y, const Tensor& factor,
                  const OptionalTensor& row_class, const OptionalTensor& col_class,
                  const OptionalTensor& row_mask, const OptionalTensor& col_mask,
                  const OptionalTensor& row_class_ranges, const OptionalTensor& col_class_ranges,
                  const OptionalTensor& row_mask_ranges, const OptionalTensor& col_mask_ranges,
                  double margin, bool totals, bool apart, const Tensor& row_shift_ranges,
                  const Tensor& col_shift_ranges, const Tensor& row_vectors,
                  const Tensor& col_vectors, const Tensor& out, const Tensor& scale_parts,
                  const Tensor& row_lost, const Tensor& col_lost) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const StatsBwd p{sizes_of(x, y),
                   numbers_of(row_class, col_class, row_mask, col_mask, row_class_ranges,
                              col_class_ranges, row_mask_ranges, col_mask_ranges),
                   data_of<float>(factor),
                   static_cast<float>(margin),
                   data_of<float>(row_shift_ranges),
                   data_of<float>(col_shift_ranges),
                   data_of<float>(row_vectors),
                   data_of<float>(col_vectors),
                   row_vectors.stride(0),
                   col_vectors.stride(0),
                   data_of<float>(scale_parts),
                   data_of<float>(row_lost),
                   data_of<float>(col_lost)};
  const TensorMap x_map = describe(x, kBlockRows), y_map = describe(y, kTileCols);
  const TensorMap out_map = describe(out, kTileRows);
  with_flags(
      [&]<bool BF16, bool C, bool M, bool T, bool A>(
          std::integer_sequence<bool, BF16, C, M, T, A>) {
        using Half = std::conditional_t<BF16, __nv_bfloat16, __half>;
        // Only float16's own derivatives are left to the caller, and only those of classes.
        if constexpr (!A || (C && !BF16))
          launch(stats_bwd_kernel<Half, C, M, T, A>, kStatsBwdShared, blocks_for(x, y), x, x_map,
                 y_map, out_map, p);
        else
          STD_TORCH_CHECK(false, "m3bind: apart is for float16 and classes");
      },
      is_bf16(x), row_class.has_value(), row_mask.has_value(), totals, apart);
}

}  // namespace
}  // namespace m3bind::cuda

#define M3BIND_INPUTS                                                                          \
  "Tensor x, Tensor y, Tensor factor, Tensor? row_class, Tensor? col_class, Tensor? row_mask," \
  " Tensor? col_mask, Tensor? row_class_ranges, Tensor? col_class_ranges,"                     \
  " Tensor? row_mask_ranges, Tensor? col_mask_ranges, float margin, bool totals"

STABLE_TORCH_LIBRARY(m3bind_hopper, m) {
  m.def("stats_fwd(" M3BIND_INPUTS
        ", Tensor(a!) row_parts, Tensor(b!) col_parts, Tensor(c!) far, Tensor(d!)? powers,"
        " Tensor(e!)? shifts, Tensor(f!)? kept_row_sums, Tensor(g!)? kept_col_sums) -> ()");
  m.def("stats_bwd(" M3BIND_INPUTS
        ", bool apart, Tensor row_shift_ranges, Tensor col_shift_ranges, Tensor row_vectors,"
        " Tensor col_vectors, Tensor(a!) out, Tensor(b!) scale_parts, Tensor(c!) row_lost,"
        " Tensor(d!) col_lost) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(m3bind_hopper, CUDA, m) {
  m.impl("stats_fwd", TORCH_BOX(&m3bind::cuda::stats_fwd_op));
  m.impl("stats_bwd", TORCH_BOX(&m3bind::cuda::stats_bwd_op));
}
