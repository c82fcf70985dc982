// Tiles of a score matrix for retrieval, one set of kernels an instruction set.
#pragma once

#include <cstdint>

namespace m3bind::cpu {

// The scores of a few queries and a few rows of the gallery. Each is one chain of multiply-adds in
// the order of the features, alike at every place of a tile: equal rows have equal scores, whatever
// their place, the number of threads or the size of the batch.
struct ScoreKernels {
  int64_t queries;  // in a tile, at most kMostQueries
  int64_t columns;  // in a tile: rows of the gallery, at most 32
  // out[i * columns + j] = sum over d of a[d * queries + i] * b[d * columns + j], for i < count.
  void (*scores)(const float* a, const float* b, int64_t features, int64_t count, float* out);
  // The score, the same bits, of one query a[d * queries] and one row b[d].
  float (*one)(const float* a, const float* b, int64_t features);
  // Bit j of above[i]: not (scores[i * columns + j] <= limits[i]). So NaN is above everything, and
  // everything is above NaN.
  void (*above)(const float* scores, int64_t count, const float* limits, uint32_t* above);
  // Bit j of equal[i]: scores[i * columns + j] == limits[i].
  void (*equal)(const float* scores, int64_t count, const float* limits, uint32_t* equal);
};

inline constexpr int64_t kMostQueries = 14;
inline constexpr int64_t kLargestTile = kMostQueries * 32;

const ScoreKernels& score_kernels_default();
#ifdef M3BIND_X86
const ScoreKernels& score_kernels_avx2();
const ScoreKernels& score_kernels_avx512();
#endif

}  // namespace m3bind::cpu
