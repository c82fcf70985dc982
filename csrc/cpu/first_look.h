// Rounded scores as a first look: what they leave open is looked at again, so that the result is
// that of the exact scores.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

#include "score_tiles.h"

namespace m3bind::cpu {

// Whether a first look pays.
class FirstLook {
 public:
  // `expected` of all scores of a query will be looked at again, if their order is random.
  FirstLook(int64_t queries, int64_t expected) : queries_(queries), expected_(expected) {}

  void count(int64_t second_looks) {
    if (second_looks != 0) second_looks_.fetch_add(second_looks, std::memory_order_relaxed);
  }

  // Asked before each step of columns, with its first.
  bool pays(int64_t column) {
    const int64_t looks = second_looks_.exchange(0);
    if (looks * kFew > (column - last_column_) * queries_) too_close_ = true;
    last_column_ = column;
    return !too_close_ && column >= kFew * expected_;
  }

 private:
  // A second look takes as long as first ones at this many scores save.
  static constexpr int64_t kFew = 128;
  int64_t queries_, expected_, last_column_ = 0;
  bool too_close_ = false;
  std::atomic<int64_t> second_looks_ = 0;
};

// Limits for rounded scores. What is not above a lowered limit is not above the limit; what is
// above a raised one is above the limit. An infinite limit stays: where there is a bound, scores
// are finite. Where there is none, everything is above NaN, and only NaN above infinity.
inline void lower_limits(const float* limits, const float* slack, int64_t count, float* lowered) {
  for (int64_t i = 0; i < count; ++i) {
    const float some = slack[i] * 1.00001f + std::abs(limits[i]) * 0x1p-22f;
    const float low = std::isinf(limits[i]) ? limits[i] : limits[i] - some;
    lowered[i] = slack[i] < kNoBound ? low : std::numeric_limits<float>::quiet_NaN();
  }
}
inline void raise_limits(const float* limits, const float* slack, int64_t count, float* raised) {
  for (int64_t i = 0; i < count; ++i) {
    const float some = slack[i] * 1.00001f + std::abs(limits[i]) * 0x1p-22f;
    const float high = std::isinf(limits[i]) ? limits[i] : limits[i] + some;
    raised[i] = slack[i] < kNoBound ? high : std::numeric_limits<float>::infinity();
  }
}

}  // namespace m3bind::cpu
