#include "float_rows.h"

#include <algorithm>

#include "row_kernels.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kBlock = 64;  // rows read at a time

// f(row, its features) on every row.
template <class F>
void for_rows(const FloatRows& t, const F& f) {
  std::vector<float> space;
  for (int64_t first = 0; first < t.rows(); first += kBlock) {
    const int64_t count = std::min(kBlock, t.rows() - first);
    const float* rows = t.read(first, count, space);
    for (int64_t i = 0; i < count; ++i) f(first + i, rows + i * t.features());
  }
}

}  // namespace

const float* FloatRows::read(int64_t first, int64_t count, std::vector<float>& space) const {
  const int64_t begin = first * features(), size = count * features();
  if (wide_) return static_cast<const float*>(tensor_.const_data_ptr()) + begin;
  space.resize(size);
  row_kernels().widen(static_cast<const uint16_t*>(tensor_.const_data_ptr()) + begin, size,
                      space.data());
  return space.data();
}

std::vector<double> FloatRows::sum(const std::vector<double>* weights) const {
  std::vector<double> total(features());
  for_rows(*this, [&](int64_t i, const float* row) {
    const double weight = weights == nullptr ? 1.0 : (*weights)[i];
    row_kernels().add_wide(total.data(), row, features_, weight);
  });
  return total;
}

std::vector<double> FloatRows::dots(const std::vector<double>& with) const {
  std::vector<double> out(rows());
  for_rows(*this, [&](int64_t i, const float* row) {
    for (int64_t d = 0; d < features(); ++d) out[i] += row[d] * with[d];
  });
  return out;
}

}  // namespace m3bind::cpu
