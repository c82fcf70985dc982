// Hopper's instructions, one function each. PTX ISA 8.0, chapters 9.7.13 (barriers), 9.7.9.27
// (bulk tensor copies) and 9.7.15 (wgmma).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define M3BIND_DEVICE __device__ __forceinline__

namespace m3bind::cuda {

using TensorMap = CUtensorMap;

M3BIND_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
M3BIND_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
M3BIND_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

M3BIND_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers in shared memory, which count arrivals and bytes

struct Barrier {
  uint64_t state;
};

M3BIND_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// What `barrier_init` wrote becomes visible to the copy engine.
M3BIND_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

M3BIND_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and lets the phase wait for so many bytes more.
M3BIND_DEVICE void barrier_arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Returns once the phase of this parity is over; the one before the first counts as over.
M3BIND_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- barriers of whole warps

M3BIND_DEVICE void block_sync() { __syncthreads(); }

M3BIND_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

M3BIND_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

M3BIND_DEVICE void warp_sync() { __syncwarp(); }

template <class T>
M3BIND_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// A bit for each thread of the warp.
M3BIND_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
M3BIND_DEVICE int bits_in(uint32_t bits) { return __popc(bits); }
M3BIND_DEVICE int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }

M3BIND_DEVICE int sum_over_warp(int own) { return __reduce_add_sync(0xffffffffu, own); }

// Adds 1 to a number that several threads count up; what it was before.
M3BIND_DEVICE int count_up(int* number) { return atomicAdd(number, 1); }

// ---- the copy engine; coordinates in elements, the first along the rows

M3BIND_DEVICE void copy_in(void* to, const TensorMap* map, int inner, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(inner), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

M3BIND_DEVICE void copy_out(const TensorMap* map, int inner, int row, const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(inner), "r"(row), "r"(shared_address(from))
      : "memory");
}

M3BIND_DEVICE void copy_out_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's copies have read what they copy.
M3BIND_DEVICE void copy_out_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Until they have written it.
M3BIND_DEVICE void copy_out_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What this thread stored in shared memory becomes visible to the copy engine and tensor cores.
M3BIND_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor cores, by the four warps of a warpgroup together

M3BIND_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
M3BIND_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most so many of this thread's groups are under way.
template <int LEFT>
M3BIND_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// What products are done for is read only after they have been waited for: to the compilers, the
// sums change here.
M3BIND_DEVICE void wgmma_done(float (&sums)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define M3BIND_8(f, i) f(i), f(i + 1), f(i + 2), f(i + 3), f(i + 4), f(i + 5), f(i + 6), f(i + 7)
#define M3BIND_64(f, i)                                                         \
  M3BIND_8(f, i), M3BIND_8(f, i + 8), M3BIND_8(f, i + 16), M3BIND_8(f, i + 24), \
      M3BIND_8(f, i + 32), M3BIND_8(f, i + 40), M3BIND_8(f, i + 48), M3BIND_8(f, i + 56)
#define M3BIND_INOUT(i) "+f"(sums[i])
#define M3BIND_WGMMA(type)                                                                     \
  asm volatile(                                                                                \
      "{\n"                                                                                    \
      ".reg .pred adds;\n"                                                                     \
      "setp.ne.b32 adds, %130, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                             \
      " {"                                                                                     \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "       \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "       \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "       \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "       \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
      "%125, %126, %127}, %128, %129, adds, 1, 1, 0, 0;\n"                                     \
      "}\n"                                                                                    \
      : M3BIND_64(M3BIND_INOUT, 0), M3BIND_64(M3BIND_INOUT, 64)                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)))

// sums (+)= A B^T for 64 rows of A and 256 of B, 16 numbers of each, which lie as `a` and `b` (see
// `operand`) tell. Thread t of the warpgroup has of rows 16 (t / 32) + t % 32 / 4 and 8 below, of
// the columns 8 j + 2 (t % 4) + {0, 1}: sums[4 j + {0, 1}] and sums[4 j + {2, 3}].
template <class Half>
M3BIND_DEVICE void wgmma(float (&sums)[128], uint64_t a, uint64_t b, bool adds);

template <>
M3BIND_DEVICE void wgmma<__nv_bfloat16>(float (&sums)[128], uint64_t a, uint64_t b, bool adds) {
  M3BIND_WGMMA("bf16");
}

template <>
M3BIND_DEVICE void wgmma<__half>(float (&sums)[128], uint64_t a, uint64_t b, bool adds) {
  M3BIND_WGMMA("f16");
}

#undef M3BIND_WGMMA
#undef M3BIND_INOUT
#undef M3BIND_64
#undef M3BIND_8

// ---- registers and numbers

template <int COUNT>
M3BIND_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
M3BIND_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The same number, of which nothing is known: what is computed of it is not kept from before.
M3BIND_DEVICE int anew(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

M3BIND_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

M3BIND_DEVICE int bits_of(float x) { return __float_as_int(x); }
M3BIND_DEVICE float from_bits(int bits) { return __int_as_float(bits); }

M3BIND_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to float16, the first in the lower half.
M3BIND_DEVICE uint32_t rounded_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

M3BIND_DEVICE float low_of(uint32_t pair) {
  return __low2float(*reinterpret_cast<const __half2*>(&pair));
}

M3BIND_DEVICE float high_of(uint32_t pair) {
  return __high2float(*reinterpret_cast<const __half2*>(&pair));
}

// Four matrices of 8 x 8 16-bit numbers, of which each thread has a pair, into shared memory: `row`
// is where row t % 8 of matrix t / 8 goes, 16 bytes.
M3BIND_DEVICE void store_matrices(void* row, const uint32_t (&pairs)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
      : "memory");
}

}  // namespace m3bind::cuda
