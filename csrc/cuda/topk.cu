// The operator of similarity_topk for CUDA: see kernels/m3bind_kernels/hopper.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "flags.h"
#include "launch.h"
#include "topk.h"

namespace m3bind::cuda {
namespace {

template <class Half, bool MASKS>
__global__ void __launch_bounds__(kThreads, 1)
    topk_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
                const __grid_constant__ Topk p) {
  topk<Half, MASKS>(p, &x, &y, aligned_shared());
}

void topk_op(const Tensor& x, const Tensor& y, const OptionalTensor& row_mask,
             const OptionalTensor& col_mask, const OptionalTensor& row_mask_ranges,
             const OptionalTensor& col_mask_ranges, const Tensor& keys, int64_t tiles_a_part,
             int64_t k, int64_t many) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int parts = static_cast<int>(keys.size(1)), capacity = static_cast<int>(keys.size(2));
  STD_TORCH_CHECK(capacity <= kMostCapacity && many + kTileCols <= capacity && k <= many,
                  "m3bind: similarity_topk has space for ", kMostCapacity, " candidates, not ",
                  capacity, " with k = ", k);
  const Topk p{sizes_of(x, y),
               numbers_of({}, {}, row_mask, col_mask, {}, {}, row_mask_ranges, col_mask_ranges),
               data_of<int64_t>(keys),
               parts,
               static_cast<int>(tiles_a_part),
               static_cast<int>(k),
               static_cast<int>(many),
               capacity};
  const TensorMap x_map = describe(x, kBlockRows), y_map = describe(y, kTileCols);
  const int items = parts * static_cast<int>((x.size(0) + kBlockRows - 1) / kBlockRows);
  const int blocks = std::min(items, blocks_for(x, y));
  with_flags(
      [&]<bool BF16, bool M>(std::integer_sequence<bool, BF16, M>) {
        using Half = std::conditional_t<BF16, __nv_bfloat16, __half>;
        launch(topk_kernel<Half, M>, kTopkShared, blocks, x, x_map, y_map, p);
      },
      is_bf16(x), row_mask.has_value());
}

}  // namespace
}  // namespace m3bind::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(m3bind_hopper, m) {
  m.def(
      "topk(Tensor x, Tensor y, Tensor? row_mask, Tensor? col_mask, Tensor? row_mask_ranges,"
      " Tensor? col_mask_ranges, Tensor(a!) keys, int tiles_a_part, int k, int many) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(m3bind_hopper, CUDA, m) {
  m.impl("topk", TORCH_BOX(&m3bind::cuda::topk_op));
}
