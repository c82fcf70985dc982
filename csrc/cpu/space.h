#pragma once

#include <cstdint>
#include <memory>

namespace m3bind::cpu {

// Uninitialised memory: every element of it is written before it is read.
template <class T>
class Space {
 public:
  explicit Space(int64_t size = 0) { resize(size); }
  bool empty() const { return data_ == nullptr; }
  // Loses what is there.
  void resize(int64_t size) {
    if (size == size_) return;
    data_.reset(size == 0 ? nullptr : new T[size]);
    size_ = size;
  }
  T* data() { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

}  // namespace m3bind::cpu
