// The operator of siglip for CUDA: see kernels/m3bind_kernels/hopper.py.
#include <torch/csrc/stable/library.h>

#include "flags.h"
#include "launch.h"
#include "siglip.h"

namespace m3bind::cuda {
namespace {

template <class Half, bool MASKS, bool LOSS, bool GRADIENT, bool APART>
__global__ void __launch_bounds__(kThreads, 1)
    siglip_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
                  const __grid_constant__ TensorMap out, const __grid_constant__ Siglip p) {
  siglip<Half, MASKS, LOSS, GRADIENT, APART>(p, &x, &y, &out, aligned_shared());
}

void siglip_op(const Tensor& x, const Tensor& y, const Tensor& logits,
               const OptionalTensor& row_class, const OptionalTensor& col_class,
               const OptionalTensor& row_mask, const OptionalTensor& col_mask,
               const OptionalTensor& row_class_ranges, const OptionalTensor& col_class_ranges,
               const OptionalTensor& row_mask_ranges, const OptionalTensor& col_mask_ranges,
               const OptionalTensor& losses, const OptionalTensor& weights,
               const OptionalTensor& boost, const OptionalTensor& wanted, const OptionalTensor& out,
               const OptionalTensor& lone, const OptionalTensor& sums) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Siglip p{sizes_of(x, y),
                 numbers_of(row_class, col_class, row_mask, col_mask, row_class_ranges,
                            col_class_ranges, row_mask_ranges, col_mask_ranges),
                 data_of<float>(logits),
                 data_of<float>(losses),
                 data_of<float>(weights),
                 data_of<float>(boost),
                 data_of<int>(wanted),
                 data_of<float>(lone),
                 data_of<float>(sums),
                 sums.has_value() ? sums->stride(0) : 0};
  const TensorMap x_map = describe(x, kBlockRows), y_map = describe(y, kTileCols);
  const TensorMap out_map = out.has_value() ? describe(*out, kTileRows) : x_map;
  with_flags(
      [&]<bool BF16, bool M, bool L, bool G, bool A>(
          std::integer_sequence<bool, BF16, M, L, G, A>) {
        using Half = std::conditional_t<BF16, __nv_bfloat16, __half>;
        // Only float16's own derivatives are left to the caller.
        if constexpr ((L || G) && (!A || (G && !BF16)))
          launch(siglip_kernel<Half, M, L, G, A>, kSiglipShared<G>, blocks_for(x, y), x, x_map,
                 y_map, out_map, p);
        else
          STD_TORCH_CHECK(false, "m3bind: losses or derivatives, and lone ones of float16 alone");
      },
      is_bf16(x), row_mask.has_value(), losses.has_value(), out.has_value(), lone.has_value());
}

}  // namespace
}  // namespace m3bind::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(m3bind_hopper, m) {
  m.def(
      "siglip(Tensor x, Tensor y, Tensor logits, Tensor? row_class, Tensor? col_class,"
      " Tensor? row_mask, Tensor? col_mask, Tensor? row_class_ranges, Tensor? col_class_ranges,"
      " Tensor? row_mask_ranges, Tensor? col_mask_ranges, Tensor(a!)? losses, Tensor? weights,"
      " Tensor? boost, Tensor? wanted, Tensor(b!)? out, Tensor(c!)? lone, Tensor(d!)? sums)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(m3bind_hopper, CUDA, m) {
  m.impl("siglip", TORCH_BOX(&m3bind::cuda::siglip_op));
}
