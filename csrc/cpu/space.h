#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace m3bind::cpu {

// Has the system find memory for what will be written: one call, not a fault a page. Where it
// cannot, the faults do it.
inline void populate(void* memory, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (end >= first + kPage)
    madvise(reinterpret_cast<void*>(first), (end - first) / kPage * kPage, MADV_POPULATE_WRITE);
#endif
}

// Uninitialised memory, aligned to 64 bytes: every element is written before it is read.
//
// Where it is large it comes from the system, and goes back at once: what a forward pass gives back
// to glibc's heap does not fit again, and would lie idle beside the memory of the backward pass.
template <class T>
class Space {
 public:
  explicit Space(int64_t size = 0) { resize(size); }
  ~Space() { resize(0); }
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;

  bool empty() const { return size_ == 0; }
  T* data() { return data_; }

  // Room for `size` elements; 0 gives the memory back. What was there is lost.
  void resize(int64_t size) {
    if (size != 0 && size <= size_) return;
    if (size_ != 0) release();
    if (size != 0) acquire(size);
  }

 private:
  static constexpr size_t kLarge = size_t{4} << 20;

  static size_t bytes(int64_t size) { return static_cast<size_t>(size) * sizeof(T); }

  void acquire(int64_t size) {
    if (bytes(size) < kLarge) {
      data_ = static_cast<T*>(::operator new(bytes(size), std::align_val_t(64)));
    } else {
      void* found =
          mmap(nullptr, bytes(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (found == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      madvise(found, bytes(size), MADV_HUGEPAGE);  // where it can
#endif
      data_ = static_cast<T*>(found);
    }
    size_ = size;
  }

  void release() {
    if (bytes(size_) < kLarge)
      ::operator delete(data_, std::align_val_t(64));
    else
      munmap(data_, bytes(size_));
    data_ = nullptr;
    size_ = 0;
  }

  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace m3bind::cpu
