// The functions of csrc/cuda/hopper.h on a processor without a GPU: every thread of a block is a
// fibre, and which of them runs next, and when a copy arrives, is drawn at random.
//
// What is asynchronous is done as late as it may be, or at any time before: a wgmma reads its
// operands when it is waited for, a copy happens at some time after it was asked for. So a stage
// that is given back too early, a phase that is waited for wrongly or a barrier that somebody
// misses shows as wrong numbers, or as a block in which nobody can go on. The layouts are those of
// the PTX ISA: the pieces of 16 bytes that the 128-byte swizzle exchanges, the matrix descriptors,
// and who has which number of an accumulator. What is not imitated: other fences, bank conflicts,
// clusters, and the rounding of the tensor cores' sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "block.h"

#define M3BIND_DEVICE inline

struct __half {};
struct __nv_bfloat16 {};

namespace m3bind::cuda {

// A matrix in memory, and the box that a copy takes.
struct TensorMap {
  char* data;
  int64_t rows, inner, row_bytes;  // 16-bit elements
  int box_rows, box_inner;         // 64 elements: rows of 128 bytes, swizzled
};

struct Barrier {
  int arrivals, missing;
  int64_t bytes;
  uint32_t phase;
};

inline int thread_index() { return block->thread(); }
inline int block_index() { return block->index; }
inline int block_count() { return block->count; }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - block->shared());
}

// ---- barriers

inline void barrier_init(Barrier* barrier, int arrivals) { *barrier = {arrivals, arrivals, 0, 0}; }
inline void barrier_init_fence() {}

inline void barrier_turn(Barrier* barrier) {
  if (barrier->missing == 0 && barrier->bytes == 0) {
    barrier->missing = barrier->arrivals;
    ++barrier->phase;
  }
}

inline void barrier_arrive(Barrier* barrier) {
  if (--barrier->missing < 0) block->stop("one arrival too many");
  barrier_turn(barrier);
}

inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  block->wait([barrier, parity] { return (barrier->phase & 1) != parity; });
}

inline void block_sync() { block->meet(0, 384, true); }
inline void named_sync(int id, int threads) { block->meet(id, threads, true); }
inline void named_arrive(int id, int threads) { block->meet(id, threads, false); }

inline void warp_sync() { block->meet_warp(); }

// What another thread of the warp has.
template <class T>
T other_of(T value, int other) {
  std::memcpy(&block->mail(thread_index()), &value, sizeof value);
  block->meet_warp();
  T found;
  std::memcpy(&found, &block->mail(other), sizeof found);
  block->meet_warp();
  return found;
}

template <class T>
T shuffle_xor(T value, int lanes) {
  return other_of(value, thread_index() ^ lanes);
}

inline uint32_t ballot(bool vote) {
  block->mail(thread_index()) = vote;
  block->meet_warp();
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i)
    bits |= static_cast<uint32_t>(block->mail(thread_index() / 32 * 32 + i) & 1) << i;
  block->meet_warp();
  return bits;
}

inline int bits_in(uint32_t bits) { return __builtin_popcount(bits); }
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

inline int sum_over_warp(int own) {
  for (int lanes = 16; lanes > 0; lanes /= 2) own += shuffle_xor(own, lanes);
  return own;
}
inline int count_up(int* number) { return (*number)++; }

// ---- copies

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Every 16-bit number of a box: f(its address in shared memory, where it is in the matrix or null).
template <class F>
void over_box(char* box, const TensorMap& map, int inner, int row, const F& f) {
  const uint32_t first = shared_address(box);
  if (first % 1024 != 0) block->stop("a box that is not aligned to its swizzle");
  for (int r = 0; r < map.box_rows; ++r)
    for (int i = 0; i < map.box_inner; ++i) {
      const bool inside = row + r < map.rows && inner + i < map.inner;
      char* there = inside ? map.data + (row + r) * map.row_bytes + 2 * (inner + i) : nullptr;
      f(block->shared() + swizzled(first + 128 * r + 2 * i), there);
    }
}

inline void copy_in(void* to, const TensorMap* map, int inner, int row, Barrier* barrier) {
  block->ask([=] {
    over_box(static_cast<char*>(to), *map, inner, row, [](char* here, const char* there) {
      if (there != nullptr)
        std::memcpy(here, there, 2);
      else
        std::memset(here, 0, 2);
    });
    barrier->bytes -= 2 * map->box_rows * map->box_inner;
    barrier_turn(barrier);
  });
}

// Reads what it copies at some time, or not before its thread waits for it.
inline void copy_out(const TensorMap* map, int inner, int row, const void* from) {
  block->must_be_fenced(static_cast<const char*>(from), 128 * map->box_rows);
  auto copy = [=] {
    over_box(static_cast<char*>(const_cast<void*>(from)), *map, inner, row,
             [](const char* here, char* there) {
               if (there != nullptr) std::memcpy(there, here, 2);
             });
  };
  if (block->random_() % 2 == 0) {
    block->late().push_back(copy);
    return;
  }
  int* left = &block->copies_out();
  ++*left;
  block->ask([=] {
    copy();
    --*left;
  });
}

inline void copy_out_commit() {}
inline void copy_out_wait() {
  for (auto& copy : block->late()) copy();
  block->late().clear();
  int* left = &block->copies_out();
  block->wait([left] { return *left == 0; });
}
inline void copy_out_wait_read() { copy_out_wait(); }
inline void async_fence() { block->unfenced().clear(); }

// ---- tensor cores

inline float number(__nv_bfloat16, const char* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const uint32_t wide = uint32_t{bits} << 16;
  float found;
  std::memcpy(&found, &wide, 4);
  return found;
}

inline float number(__half, const char* at) {
  _Float16 found;
  std::memcpy(&found, at, 2);
  return static_cast<float>(found);
}

// Number k of row r of an operand.
template <class Half>
float number_of(uint64_t operand, int r, int k) {
  if (operand >> 62 != 1) block->stop("an operand without the 128-byte swizzle");
  const uint32_t first = static_cast<uint32_t>(operand & 0x3fff) << 4;
  const uint32_t eight_rows = static_cast<uint32_t>(operand >> 32 & 0x3fff) << 4;
  return number(Half{},
                block->shared() + swizzled(first + r / 8 * eight_rows + r % 8 * 128 + 2 * k));
}

inline void wgmma_fence() {}
inline void wgmma_done(float (&)[128]) {}

template <class Half>
void wgmma(float (&sums)[128], uint64_t a, uint64_t b, bool adds) {
  const int thread = thread_index() % 128;
  float* own = sums;
  block->group().push_back([=] {
    float rows[2][16];
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 16; ++k)
        rows[r][k] = number_of<Half>(a, 16 * (thread / 32) + thread % 32 / 4 + 8 * r, k);
    for (int j = 0; j < 32; ++j)
      for (int e = 0; e < 2; ++e) {
        float column[16];
        for (int k = 0; k < 16; ++k)
          column[k] = number_of<Half>(b, 8 * j + 2 * (thread % 4) + e, k);
        for (int r = 0; r < 2; ++r) {
          float& sum = own[4 * j + 2 * r + e];
          float total = adds ? sum : 0;
          for (int k = 0; k < 16; ++k) total += rows[r][k] * column[k];
          sum = total;
        }
      }
  });
}

inline void wgmma_commit() {
  block->groups().push_back(std::move(block->group()));
  block->group().clear();
}

template <int LEFT>
void wgmma_wait() {
  auto& groups = block->groups();
  block->meet_warp();
  while (groups.size() > LEFT) {
    for (auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  block->meet_warp();
}

// ---- registers and numbers

template <int COUNT>
void fewer_registers() {}
template <int COUNT>
void more_registers() {}

inline int anew(int number) { return number; }

inline float power_of_two(float x) { return std::exp2(x); }

inline int bits_of(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bits(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float reciprocal(float x) { return 1 / x; }

inline uint32_t rounded_pair(float low, float high) {
  const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t pair;
  std::memcpy(&pair, both, 4);
  return pair;
}

inline float low_of(uint32_t pair) { return number(__half{}, reinterpret_cast<char*>(&pair)); }
inline float high_of(uint32_t pair) { return number(__half{}, reinterpret_cast<char*>(&pair) + 2); }

inline void store_matrices(void* row, const uint32_t (&pairs)[4]) {
  const int own = thread_index(), lane = own % 32, warp = own - lane;
  block->unfenced().push_back(static_cast<const char*>(row));
  for (int matrix = 0; matrix < 4; ++matrix) {
    block->mail(own) = pairs[matrix];
    block->meet_warp();
    if (lane / 8 == matrix)
      for (int i = 0; i < 4; ++i)
        std::memcpy(static_cast<char*>(row) + 4 * i, &block->mail(warp + lane % 8 * 4 + i), 4);
    block->meet_warp();
  }
}

}  // namespace m3bind::cuda
