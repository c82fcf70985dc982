#include "float_rows.h"

#include "row_blocks.h"
#include "row_kernels.h"

namespace m3bind::cpu {

const float* FloatRows::read(int64_t first, int64_t count, std::vector<float>& space) const {
  const int64_t begin = first * features(), size = count * features();
  if (wide_) return static_cast<const float*>(tensor_.const_data_ptr()) + begin;
  space.resize(size);
  row_kernels().widen(static_cast<const uint16_t*>(tensor_.const_data_ptr()) + begin, size,
                      space.data());
  return space.data();
}

std::vector<double> FloatRows::sum(const std::vector<double>* weights) const {
  std::vector<double> parts(blocks_of(rows_) * features_), total(features_);
  for_row_blocks(rows_, [&](int64_t begin, int64_t end) {
    double* part = parts.data() + begin / kBlockRows * features_;
    for_rows(begin, end, [&](int64_t i, const float* row) {
      row_kernels().add_wide(part, row, features_, weights == nullptr ? 1.0 : (*weights)[i]);
    });
  });
  for (int64_t block = 0; block < blocks_of(rows_); ++block)
    for (int64_t d = 0; d < features_; ++d) total[d] += parts[block * features_ + d];
  return total;
}

std::vector<double> FloatRows::dots(const std::vector<double>& with) const {
  std::vector<double> out(rows_);
  for_row_blocks(rows_, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, [&](int64_t i, const float* row) {
      for (int64_t d = 0; d < features_; ++d) out[i] += row[d] * with[d];
    });
  });
  return out;
}

}  // namespace m3bind::cpu
