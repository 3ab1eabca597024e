// Which instructions of the machine do the kernels use that C++ has no word for? Needs sm_80.
//
// With CUDA_EMU defined, emulated_ptx.h gives the same functions in plain C++: the kernels then run on a
// CPU, under its sanitizers.
#pragma once

#include <cstdint>

#include "pointwise.h"

#ifdef CUDA_EMU
#include "emulated_ptx.h"
#else

#define CMF_DEVICE __device__ __forceinline__
#define CMF_DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint8_t name[]

namespace convmixer_fast::cuda {

using Shared = uint32_t;  // an address in shared memory

CMF_DEVICE Shared shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies kBytes (4 or 16) to shared memory in the background; zeros, and nothing is read, where not
// `inside`. 16 bytes pass L1 by: what a tile reads is read once.
template <int kBytes>
CMF_DEVICE void copy_async(Shared to, const void* from, bool inside) {
  static_assert(kBytes == 4 || kBytes == 16);
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  }
}

// Ends a group of copies.
CMF_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until this thread's copies are done, but for those of its kNewest newest groups.
template <int kNewest>
CMF_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

CMF_DEVICE void store_shared_32(Shared to, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
CMF_DEVICE void store_shared_128(Shared to, const uint32_t (&word)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0]), "r"(word[1]),
               "r"(word[2]), "r"(word[3])
               : "memory");
}
CMF_DEVICE void load_shared_128(uint32_t (&word)[4], Shared from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(from)
               : "memory");
}

// x * factor, of and as bits. `always` is true: an instruction under a predicate cannot but leave its result
// where x was, while one without moves, and with it the registers of whole fragments.
CMF_DEVICE uint32_t multiplied_in_place(uint32_t x, float factor, bool always) {
  asm("{ .reg .pred q; setp.ne.b32 q, %2, 0; @q mul.rn.f32 %0, %0, %1; }"
      : "+r"(x)
      : "f"(factor), "r"(static_cast<int>(always)));
  return x;
}

// Four 8 x 8 matrices of 16-bit values (8 x 4 of 32 bits): lane l passes the address of row l % 8 of
// matrix l / 8 and receives, of each, word l % 4 of row l / 4.
CMF_DEVICE void load_matrices(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

#define CMF_MMA(shape_and_types)                                                                 \
  asm volatile("mma.sync.aligned." shape_and_types                                               \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(w0), "r"(w1))

// sum [16][8] += a [16][32 bytes] * w [8][32 bytes]^T, over the 32 lanes of a warp.
template <Type kType>
CMF_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t w0, uint32_t w1) {
  if constexpr (kType == Type::bf16) {
    CMF_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (kType == Type::fp16) {
    CMF_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    CMF_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
}
#undef CMF_MMA

// 2^x and 1 / x to 2 units in the last place; results below the normal range are 0.
CMF_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CMF_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values, each rounded to 16 bits: `low` comes first in memory.
template <Type kType>
CMF_DEVICE uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (kType == Type::bf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

CMF_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
CMF_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// One instruction each, with a predicate: a condition in C++ may become a branch.
CMF_DEVICE float either(bool first, float x, float y) {
  float z;
  asm("{ .reg .pred q; setp.ne.b32 q, %3, 0; selp.f32 %0, %1, %2, q; }"
      : "=f"(z)
      : "f"(x), "f"(y), "r"(static_cast<int>(first)));
  return z;
}
CMF_DEVICE float load_or_zero(const float* from, bool inside) {
  float x;
  asm("{ .reg .pred q; setp.ne.b32 q, %2, 0; mov.f32 %0, 0f00000000; @q ld.global.nc.f32 %0, [%1]; }"
      : "=f"(x)
      : "l"(from), "r"(static_cast<int>(inside)));
  return x;
}
CMF_DEVICE uint32_t load_or_zero_16(const uint16_t* from, bool inside) {
  uint16_t x;
  asm volatile("{ .reg .pred q; setp.ne.b32 q, %2, 0; mov.b16 %0, 0; @q ld.global.nc.b16 %0, [%1]; }"
               : "=h"(x)
               : "l"(from), "r"(static_cast<int>(inside)));
  return x;
}
CMF_DEVICE void store_128(void* to, const uint32_t (&word)[4], bool inside) {
  asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0; @q st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::
                   "l"(to),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(static_cast<int>(inside))
               : "memory");
}
CMF_DEVICE void store_32(void* to, uint32_t word, bool inside) {
  asm volatile("{ .reg .pred q; setp.ne.b32 q, %2, 0; @q st.global.b32 [%0], %1; }" ::"l"(to), "r"(word),
               "r"(static_cast<int>(inside))
               : "memory");
}
CMF_DEVICE void store_16(void* to, uint16_t half, bool inside) {
  asm volatile("{ .reg .pred q; setp.ne.b32 q, %2, 0; @q st.global.b16 [%0], %1; }" ::"l"(to), "h"(half),
               "r"(static_cast<int>(inside))
               : "memory");
}

}  // namespace convmixer_fast::cuda
#endif
