// The kernels of csrc/cuda on emulated blocks, for ctypes.
#include "flags.h"
#include "siglip.h"
#include "stats_bwd.h"
#include "stats_fwd.h"
#include "topk.h"

using namespace m3bind::cuda;

namespace {

TensorMap map_of(const void* data, int rows, int inner, int row_stride, int box_rows) {
  return {static_cast<char*>(const_cast<void*>(data)),
          rows,
          inner,
          2 * int64_t{row_stride},
          box_rows,
          64};
}

template <class F>
void launch(int blocks, uint64_t seed, int shared_bytes, const F& kernel) {
  for (int i = 0; i < blocks; ++i) {
    Block emulated(seed + static_cast<uint64_t>(i), shared_bytes);
    emulated.index = i;
    emulated.count = blocks;
    block = &emulated;
    emulated.run(kThreads, [&] { kernel(emulated.shared()); });
  }
}

}  // namespace

// flags: classes, masks, totals, keep
extern "C" void emulate_stats_fwd(bool bf16, const bool* flags, const void* x, const void* y,
                                  void* powers, int powers_stride, const StatsFwd* p, int blocks,
                                  uint64_t seed) {
  const Sizes& s = p->sizes;
  const TensorMap x_map = map_of(x, s.rows, s.features, s.features, kBlockRows);
  const TensorMap y_map = map_of(y, s.cols, s.features, s.features, kTileCols);
  const TensorMap powers_map = map_of(powers, p->kept_rows, s.cols, powers_stride, kTileRows);
  const auto run = [&]<bool C, bool M, bool T, bool K>(std::integer_sequence<bool, C, M, T, K>) {
    if constexpr (!(T && K))
      launch(blocks, seed, kStatsFwdShared<K>, [&](char* shared) {
        if (bf16)
          stats_fwd<__nv_bfloat16, C, M, T, K>(*p, &x_map, &y_map, &powers_map, shared);
        else
          stats_fwd<__half, C, M, T, K>(*p, &x_map, &y_map, &powers_map, shared);
      });
  };
  with_flags(run, flags[0], flags[1], flags[2], flags[3]);
}

// flags: classes, masks, totals, apart
extern "C" void emulate_stats_bwd(bool bf16, const bool* flags, const void* x, const void* y,
                                  void* out, int out_stride, const StatsBwd* p, int blocks,
                                  uint64_t seed) {
  const Sizes& s = p->sizes;
  const TensorMap x_map = map_of(x, s.rows, s.features, s.features, kBlockRows);
  const TensorMap y_map = map_of(y, s.cols, s.features, s.features, kTileCols);
  const TensorMap out_map = map_of(out, s.rows, s.cols, out_stride, kTileRows);
  const auto run = [&]<bool C, bool M, bool T, bool A>(std::integer_sequence<bool, C, M, T, A>) {
    launch(blocks, seed, kStatsBwdShared, [&](char* shared) {
      if (bf16)
        stats_bwd<__nv_bfloat16, C, M, T, A>(*p, &x_map, &y_map, &out_map, shared);
      else
        stats_bwd<__half, C, M, T, A>(*p, &x_map, &y_map, &out_map, shared);
    });
  };
  with_flags(run, flags[0], flags[1], flags[2], flags[3]);
}

// flags: masks, loss, gradient, apart
extern "C" void emulate_siglip(bool bf16, const bool* flags, const void* x, const void* y,
                               void* out, int out_stride, const Siglip* p, int blocks,
                               uint64_t seed) {
  const Sizes& s = p->sizes;
  const TensorMap x_map = map_of(x, s.rows, s.features, s.features, kBlockRows);
  const TensorMap y_map = map_of(y, s.cols, s.features, s.features, kTileCols);
  const TensorMap out_map = map_of(out, s.rows, s.cols, out_stride, kTileRows);
  const auto run = [&]<bool M, bool L, bool G, bool A>(std::integer_sequence<bool, M, L, G, A>) {
    launch(blocks, seed, kSiglipShared<G>, [&](char* shared) {
      if (bf16)
        siglip<__nv_bfloat16, M, L, G, A>(*p, &x_map, &y_map, &out_map, shared);
      else
        siglip<__half, M, L, G, A>(*p, &x_map, &y_map, &out_map, shared);
    });
  };
  with_flags(run, flags[0], flags[1], flags[2], flags[3]);
}

// flags: masks
extern "C" void emulate_topk(bool bf16, const bool* flags, const void* x, const void* y,
                             const Topk* p, int blocks, uint64_t seed) {
  const Sizes& s = p->sizes;
  const TensorMap x_map = map_of(x, s.rows, s.features, s.features, kBlockRows);
  const TensorMap y_map = map_of(y, s.cols, s.features, s.features, kTileCols);
  const auto run = [&]<bool M>(std::integer_sequence<bool, M>) {
    launch(blocks, seed, kTopkShared, [&](char* shared) {
      if (bf16)
        topk<__nv_bfloat16, M>(*p, &x_map, &y_map, shared);
      else
        topk<__half, M>(*p, &x_map, &y_map, shared);
    });
  };
  with_flags(run, flags[0]);
}
