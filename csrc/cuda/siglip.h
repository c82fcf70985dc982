// siglip: losses of all pairs, derivatives by their dot products rounded to float16, or both in one
// pass. What a tile leaves behind is told by `_siglip_kernel` in kernels/m3bind_kernels/siglip.py.
#pragma once

#include "outgoing.h"

namespace m3bind::cuda {

struct Siglip {
  Sizes sizes;
  Numbers numbers;
  const float* logits;   // [2]: scale and bias
  float* losses;         // [tiles of columns, rows]: sums of a row's losses
  const float* weights;  // [rows]: of each row's derivatives
  const float* boost;    // [1]: by which derivatives are multiplied before they are rounded
  const int* wanted;     // [1]: 0: do nothing
  float* lone;           // [rows]: the derivative at a pair that is alone in its class
  float* sums;           // [3, tiles]: derivatives, derivatives * dots; largest derivative
  int64_t plane;         // elements from plane to plane of `sums`
};

// e^t for t <= 0, 0 below the normal numbers. Of t * log2(e) only the fraction is rounded: see
// `exp_below_zero` in sigmoid.py.
M3BIND_DEVICE float exp_below_zero(float t) {
  // The nearest integer is in the last digits of what 1.5 * 2^23 has been added to.
  const float added = fmaf(t, 1.4426950408889634f, 12582912.0f), whole = added - 12582912.0f;
  const float rest = fmaf(whole, 2.1219444005469057e-4f, fmaf(whole, -0.693359375f, t));
  const float power = power_of_two(rest * 1.4426950408889634f);
  const float found = from_bits(bits_of(power) + (bits_of(added) << 23));
  return t >= -87.0f ? found : t < -87.0f ? 0.0f : t;  // a NaN stays
}

// log(1 + e) for 0 <= e <= 1: a polynomial, whose relative error is 5e-9 before rounding.
M3BIND_DEVICE float log_one_plus(float e) {
  float p = fmaf(e, -0.0032440212089568377f, 0.01985144428908825f);
  p = fmaf(p, e, -0.056959498673677444f);
  p = fmaf(p, e, 0.10603651404380798f);
  p = fmaf(p, e, -0.15305590629577637f);
  p = fmaf(p, e, 0.1967593878507614f);
  p = fmaf(p, e, -0.24954134225845337f);
  p = fmaf(p, e, 0.3332996368408203f);
  p = fmaf(p, e, -0.4999990165233612f);
  p = fmaf(p, e, 1.0f);
  return p * e;
}

// LOSS, GRADIENT: what is wanted. APART: derivatives at lone pairs go to `lone`.
template <bool MASKS, bool LOSS, bool GRADIENT, bool APART>
class SiglipTile {
 public:
  M3BIND_DEVICE SiglipTile(const Siglip& p, Tile tile, const Meeting& meeting,
                           const Outgoing& outgoing)
      : p_(p), tile_(tile), meeting_(meeting), outgoing_(outgoing) {}

  M3BIND_DEVICE void run(float (&dots)[128]) {
    if (GRADIENT && Lane().thread == 0) outgoing_.wait();
    if (is_special<true, MASKS>(p_.numbers, p_.sizes, tile_))
      all_pieces(dots, PairRules<true, MASKS>(p_.numbers, p_.sizes, tile_, Lane(), meeting_));
    else
      all_pieces(dots, NoRules());
  }

 private:
  struct Sums {
    float loss[kOwnRows] = {0, 0};
    float derivatives = 0, by_scale = 0, largest = 0;
  };

  template <class Rules>
  M3BIND_DEVICE void all_pieces(float (&dots)[128], const Rules& rules) {
    meeting_.sync();  // what left before has been read
    Sums sums;
    over_pieces<Rules::kAny ? 1 : 2>(dots, [&](int first, int place) {
      const Lane lane;
      const float scale = p_.logits[0], bias = p_.logits[1];
      const RowNumbers rows = rules.rows(lane);
      float weights[kOwnRows];
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) weights[r] = GRADIENT ? weight(lane.row(r)) : 0.0f;
      const float boost = GRADIENT ? *p_.boost : 0.0f;
      uint32_t pairs[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; i += 2) {
        float stored[kOwnRows][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Pair rule[kOwnRows] = {};
          rules.of_column(rows, lane.col(first + i + e), rule);
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r)
            stored[r][e] =
                boost * one(dots[at(r, place + i + e)], scale, bias, weights[r], r, rule[r], sums);
        }
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) pairs[i + r] = rounded_pair(stored[r][0], stored[r][1]);
      }
      if (GRADIENT) outgoing_.put(first, pairs);
    });
    finish(sums);
  }

  M3BIND_DEVICE float weight(int row) const {
    const int at = tile_.row * kTileRows + row;
    return at < p_.sizes.rows ? p_.weights[at] : 0.0f;
  }

  // One pair: adds to the sums, and returns the derivative to be stored.
  M3BIND_DEVICE float one(float dot, float scale, float bias, float weight, int r, const Pair& pair,
                          Sums& sums) const {
    float logit = fmaf(dot, scale, bias);
    if (pair.positive) logit = -logit;
    const float power = exp_below_zero(-fabsf(logit));
    if (LOSS) {
      const float loss = (logit > 0.0f ? logit : 0.0f) + log_one_plus(power);
      sums.loss[r] += pair.left_out ? 0.0f : loss;
    }
    if (!GRADIENT) return 0.0f;
    float grad = (logit < 0.0f ? power : 1.0f) * reciprocal(1.0f + power) * weight;
    if (pair.left_out) grad = 0.0f;
    if (pair.positive) grad = -grad;
    sums.derivatives += grad;
    sums.by_scale += grad * dot;
    if (APART && pair.not_in_row && pair.not_in_col) {
      p_.lone[tile_.row * kTileRows + Lane().row(r)] = grad;
      grad = 0.0f;
    }
    sums.largest = higher(sums.largest, fabsf(grad));
    return grad;
  }

  M3BIND_DEVICE void finish(const Sums& sums) {
    const Lane lane;
    if (LOSS) {
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        const float total = row_sum(sums.loss[r]);
        const int row = tile_.row * kTileRows + lane.row(r);
        if (row < p_.sizes.rows) p_.losses[int64_t{tile_.col} * p_.sizes.rows + row] = total;
      }
    }
    if (!GRADIENT) return;
    async_fence();
    meeting_.sync();
    if (lane.thread == 0) outgoing_.send(p_.sizes, tile_);
    const auto add = [](float a, float b) { return a + b; };
    const float derivatives = over_warpgroup(sums.derivatives, meeting_, add);
    const float by_scale = over_warpgroup(sums.by_scale, meeting_, add);
    const float largest = over_warpgroup(sums.largest, meeting_, higher);
    if (lane.thread != 0) return;
    const int tiles_n = ceil_div(p_.sizes.rows, kTileRows);
    float* own = p_.sums + index_of(tile_, tiles_n, ceil_div(p_.sizes.cols, kTileCols));
    own[0] = derivatives;
    own[p_.plane] = by_scale;
    own[2 * p_.plane] = largest;
  }

  const Siglip& p_;
  Tile tile_;
  Meeting meeting_;
  Outgoing outgoing_;
};

template <bool GRADIENT>
constexpr int kSiglipStages = GRADIENT ? 3 : 4;
template <bool GRADIENT>
constexpr int kSiglipShared = Ring<kSiglipStages<GRADIENT>>::kBytes +
                              2 * ((GRADIENT ? Outgoing::kBytes : 0) + Meeting::kBytes) +
                              2 * kSiglipStages<GRADIENT> * sizeof(Barrier) + 1024;  // to align it

// `shared` is aligned to 1024 bytes; `out` is read only for a gradient.
template <class Half, bool MASKS, bool LOSS, bool GRADIENT, bool APART>
M3BIND_DEVICE void siglip(const Siglip& p, const TensorMap* x, const TensorMap* y,
                          const TensorMap* out, char* shared) {
  if (GRADIENT && *p.wanted == 0) return;
  using Stages = Ring<kSiglipStages<GRADIENT>>;
  char* outgoing = shared + Stages::kBytes;
  char* meetings = outgoing + (GRADIENT ? 2 * Outgoing::kBytes : 0);
  Barrier* barriers = reinterpret_cast<Barrier*>(meetings + 2 * Meeting::kBytes);
  over_tiles<Half>(Stages(shared, barriers, p.sizes), x, y, p.sizes, AllBlocks{p.sizes},
                   [&](float (&dots)[128], Tile tile) {
                     const int half = tile.row % 2;
                     SiglipTile<MASKS, LOSS, GRADIENT, APART>(
                         p, tile, Meeting(meetings, half),
                         Outgoing(outgoing + half * Outgoing::kBytes, out))
                         .run(dots);
                   });
  if (GRADIENT) copy_out_wait();  // before the block's memory goes
}

}  // namespace m3bind::cuda
