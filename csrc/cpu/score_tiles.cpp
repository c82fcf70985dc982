#include "score_tiles.h"

#include <torch/headeronly/core/ScalarType.h>

#include <numeric>

#include "row_kernels.h"

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

// Packed queries of a block: few enough to stay near the third-level cache, and so many that
// packing the gallery anew for every block is next to nothing.
constexpr int64_t kBlockFloats = int64_t{1} << 23;
constexpr int64_t kMinBlock = 256, kMaxBlock = 4096;
// Packed rows of the gallery at a time, for all threads, and the part of them that a thread takes
// past all its queries: it stays in the second-level cache.
constexpr int64_t kStepFloats = int64_t{1} << 20;
constexpr int64_t kGroupFloats = int64_t{1} << 17;
// A cache line of floats: packing reads each line of a row once.
constexpr int64_t kLine = 16;

}  // namespace

const ScoreKernels& score_kernels() {
  static const ScoreKernels& chosen = []() -> const ScoreKernels& {
#ifdef M3BIND_X86
    if (&row_kernels() == &row_kernels_avx512()) return score_kernels_avx512();
    if (&row_kernels() == &row_kernels_avx2()) return score_kernels_avx2();
#endif
    return score_kernels_default();
  }();
  return chosen;
}

const RoundedKernels* rounded_kernels() {
#ifdef M3BIND_X86
  if (capability().bf16_products) return &rounded_kernels_avx512bf16();
#endif
  return nullptr;
}

FeatureRows::FeatureRows(const Tensor& features) : tensor_(features) {
  STD_TORCH_CHECK(features.dim() == 2, "features must be matrices");
  rows_ = features.size(0);
  features_ = features.size(1);
  row_stride_ = features.stride(0);
  feature_stride_ = features.stride(1);
}

template <class T>
void FeatureRows::pack_as(const int64_t* rows, int64_t count, int64_t width, float* out) const {
  const T* data = static_cast<const T*>(tensor_.const_data_ptr());
  for (int64_t first = 0; first < features_; first += kLine) {
    const int64_t last = std::min(features_, first + kLine);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = data + rows[r] * row_stride_;
      for (int64_t d = first; d < last; ++d)
        out[d * width + r] = static_cast<float>(row[d * feature_stride_]);
    }
    for (int64_t r = count; r < width; ++r)
      for (int64_t d = first; d < last; ++d) out[d * width + r] = 0;
  }
}

void FeatureRows::pack(const int64_t* rows, int64_t count, int64_t width, float* out) const {
  switch (tensor_.scalar_type()) {
    case ScalarType::Float:
      return pack_as<float>(rows, count, width, out);
    case ScalarType::BFloat16:
      return pack_as<torch::headeronly::BFloat16>(rows, count, width, out);
    case ScalarType::Half:
      return pack_as<torch::headeronly::Half>(rows, count, width, out);
    default:
      STD_TORCH_CHECK(false, "features must be float32, bfloat16 or float16");
  }
}

const float* FeatureRows::row(int64_t at, float* space) const {
  if (tensor_.scalar_type() == ScalarType::Float && feature_stride_ == 1)
    return static_cast<const float*>(tensor_.const_data_ptr()) + at * row_stride_;
  pack(&at, 1, 1, space);
  return space;
}

ScoreTiles::ScoreTiles(const Tensor& queries, const Tensor& gallery)
    : queries_(queries), gallery_(gallery) {
  STD_TORCH_CHECK(queries_.features() == gallery_.features(),
                  "queries and gallery must have the same number of features");
  const ScoreKernels& kernels = score_kernels();
  const int64_t features = std::max<int64_t>(1, queries_.features());
  const auto whole = [](int64_t rows, int64_t width) { return (rows + width - 1) / width * width; };
  const int64_t most = std::clamp(kBlockFloats / features, kMinBlock, kMaxBlock);
  const int64_t blocks = std::max<int64_t>(1, (num_queries() + most - 1) / most);
  block_ = whole(std::max<int64_t>(1, (num_queries() + blocks - 1) / blocks), kernels.queries);
  step_ = whole(std::max<int64_t>(1, kStepFloats / features), kernels.columns);
  trial_ = whole(std::max<int64_t>(1, step_ / 8), kernels.columns);
  group_ = std::max<int64_t>(1, kGroupFloats / (features * kernels.columns));
  packed_queries_.resize(block_ * features);
  packed_gallery_.resize(whole(std::min(step_, num_columns()), kernels.columns) * features);
}

void ScoreTiles::start(int64_t first, int64_t count) {
  count_ = count;
  const int64_t width = score_kernels().queries;
  torch::stable::parallel_for(0, query_panels(), 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> rows(width);
    for (int64_t i = begin * width; i < std::min(count, end * width); i += width) {
      std::iota(rows.begin(), rows.end(), first + i);
      queries_.pack(rows.data(), std::min(width, count - i), width,
                    packed_queries_.data() + i * queries_.features());
    }
  });
  if (rounded_kernels() != nullptr) round_queries(first, count);
}

// Rounds rows [first, first + count) into a panel of `width`; returns their largest norms.
ScoreTiles::Norms ScoreTiles::round_panel(const FeatureRows& from, int64_t first, int64_t count,
                                          int64_t width, uint32_t* out, Norms* each) const {
  std::vector<float> space(from.features());
  std::vector<uint32_t> rounded(pairs());
  Norms largest;
  if (count < width) std::fill(out, out + pairs() * width, 0);
  for (int64_t r = 0; r < count; ++r) {
    Norms norms;
    rounded_kernels()->round(from.row(first + r, space.data()), from.features(), rounded.data(),
                             &norms.whole, &norms.lost);
    for (int64_t p = 0; p < pairs(); ++p) out[p * width + r] = rounded[p];
    // NaN goes in, and stays.
    if (!(norms.whole <= largest.whole)) largest.whole = norms.whole;
    if (!(norms.lost <= largest.lost)) largest.lost = norms.lost;
    if (each != nullptr) each[r] = norms;
  }
  return largest;
}

void ScoreTiles::round_queries(int64_t first, int64_t count) {
  const int64_t width = score_kernels().queries;
  rounded_queries_.resize(query_panels() * width * pairs());
  query_norms_.resize(query_panels() * width);
  torch::stable::parallel_for(0, query_panels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < std::min(count, end * width); i += width)
      round_panel(queries_, first + i, std::min(width, count - i), width,
                  rounded_queries_.data() + i * pairs(), query_norms_.data() + i);
  });
}

void ScoreTiles::round_gallery(int64_t first, int64_t count) {
  const int64_t width = score_kernels().columns;
  const int64_t panels = (count + width - 1) / width;
  rounded_gallery_.resize(panels * width * pairs());
  panel_norms_.resize(panels);
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      panel_norms_[j] = round_panel(gallery_, first + j * width, std::min(width, count - j * width),
                                    width, rounded_gallery_.data() + j * width * pairs(), nullptr);
  });
}

void ScoreTiles::rounded_scores(const ScoreTile& tile, int64_t panel, float* scores,
                                float* slack) const {
  const ScoreKernels& kernels = score_kernels();
  rounded_kernels()->scores(rounded_queries_.data() + tile.first_query * pairs(),
                            rounded_gallery_.data() + panel * kernels.columns * pairs(), pairs(),
                            tile.num_queries, scores);
  // Upper bounds in floats: a little more than each rounding takes.
  constexpr float more = 1.00001f;
  const Norms other = panel_norms_[panel];
  const Norms* own = query_norms_.data() + tile.first_query;
  const float both = other.whole + other.lost;
  const float sums = static_cast<float>(rounding_of_sums(gallery_.features())) * both;
  const float to_whole = (other.lost + sums) * more, to_lost = (both + sums) * more;
  const float zero = static_cast<float>(flushed_to_zero(gallery_.features()));
  for (int64_t i = 0; i < tile.num_queries; ++i)
    slack[i] = (own[i].whole * to_whole + own[i].lost * to_lost + zero) * more;
}

void ScoreTiles::pack_gallery(int64_t first, int64_t count) {
  const int64_t width = score_kernels().columns;
  torch::stable::parallel_for(0, (count + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> rows(width);
    for (int64_t j = begin * width; j < std::min(count, end * width); j += width) {
      std::iota(rows.begin(), rows.end(), first + j);
      gallery_.pack(rows.data(), std::min(width, count - j), width,
                    packed_gallery_.data() + j * gallery_.features());
    }
  });
}

void ScoreTiles::listed(int64_t row, const int64_t* columns, int64_t count, float* out) const {
  const ScoreKernels& kernels = score_kernels();
  std::vector<float> packed(kernels.columns * gallery_.features());
  alignas(64) float scores[kLargestTile];
  for (int64_t first = 0; first < count; first += kernels.columns) {
    const int64_t some = std::min(kernels.columns, count - first);
    gallery_.pack(columns + first, some, kernels.columns, packed.data());
    kernels.scores(packed_queries(row), packed.data(), gallery_.features(), 1, scores);
    std::copy(scores, scores + some, out + first);
  }
}

}  // namespace m3bind::cpu
