// What csrc/cuda/ptx.cuh declares, in plain C++, on top of cuda_emu.h: kernels run on a CPU, one fiber a
// thread, under its sanitizers. Included by ptx.cuh where CUDA_EMU is defined.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda_emu.h"

#define CMF_DEVICE inline
#define CMF_DYNAMIC_SHARED(name) EMU_DYNAMIC_SHARED(uint8_t, name)

namespace convmixer_fast::cuda {

using std::min;
using Shared = uint8_t*;

inline Shared shared_address(void* p) { return static_cast<uint8_t*>(p); }

template <int kBytes>
void copy_async(Shared to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0) emu::die("copy_async: misaligned destination");
  if (inside && reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
    emu::die("copy_async: misaligned source");
  }
  emu::cp_async(to, from, kBytes, inside ? kBytes : 0);
}
inline void copy_commit() { emu::cp_commit(); }
template <int kNewest>
void copy_wait() {
  emu::cp_wait(kNewest);
}

inline void store_shared_32(Shared to, uint32_t word) { memcpy(to, &word, 4); }
inline void store_shared_128(Shared to, const uint32_t (&word)[4]) { memcpy(to, word, 16); }
inline void load_shared_128(uint32_t (&word)[4], Shared from) { memcpy(word, from, 16); }
inline void load_matrices(uint32_t (&r)[4], Shared row) { emu::ldmatrix(r, 4, row); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                     : exponent != 0 ? std::ldexp(1024.0f + fraction, exponent - 25)
                                     : std::ldexp(static_cast<float>(fraction), -24);
  return bits >> 15 != 0 ? -size : size;
}
inline uint16_t float_to_half(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (size != size) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
  // nearbyint rounds to even; a carry into the exponent gives the right bits.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | (units + (exponent + 14) * 1024));
}

inline uint32_t multiplied_in_place(uint32_t x, float factor, bool) {
  return bits_of(float_of(x) * factor);
}

// The mathematical product: each lane computes its four sums from what all lanes hold.
template <Type kType>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t w0, uint32_t w1) {
  emu::Warp& warp = emu::warps[emu::current->linear / 32];
  const int lane = emu::current->linear & 31;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], w0, w1};
  memcpy(warp.in[lane], mine, sizeof mine);
  emu::warp_sync("mma", 32);
  // Element k of the 32 bytes that row r of a block, 0 to 7, holds in the registers from `first` on: one
  // register for each 16 bytes, `apart` registers away from each other.
  auto element = [&](int r, int k, int first, int apart) {
    constexpr int kEach = kType == Type::tf32 ? 1 : 2;  // elements in a register
    const int high = k / (4 * kEach), quad = k / kEach % 4;
    const unsigned char* at = warp.in[r * 4 + quad] + (first + high * apart) * 4;
    if constexpr (kType == Type::tf32) {
      uint32_t word;
      memcpy(&word, at, 4);
      return float_of(word & 0xffffe000u);
    } else {
      uint16_t half;
      memcpy(&half, at + k % 2 * 2, 2);
      return kType == Type::bf16 ? emu::bf16_to_float(half) : half_to_float(half);
    }
  };
  for (int e = 0; e < 4; ++e) {
    float products = 0;
    for (int k = 0; k < (kType == Type::tf32 ? 8 : 16); ++k) {
      products += element(lane / 4, k, e / 2, 2) * element(lane % 4 * 2 + e % 2, k, 4, 1);
    }
    sum[e] += products;
  }
  emu::warp_sync("mma", 32);
}

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.0f / x; }

template <Type kType>
uint32_t pack(float low, float high) {
  auto half = [](float x) -> uint32_t {
    return kType == Type::bf16 ? emu::float_to_bf16(x) : float_to_half(x);
  };
  return half(low) | half(high) << 16;
}

inline float either(bool first, float x, float y) { return first ? x : y; }
inline float load_or_zero(const float* from, bool inside) { return inside ? *from : 0.0f; }
inline uint32_t load_or_zero_16(const uint16_t* from, bool inside) { return inside ? *from : 0; }
inline void store_128(void* to, const uint32_t (&word)[4], bool inside) {
  if (inside && reinterpret_cast<uintptr_t>(to) % 16 != 0) emu::die("store_128: misaligned");
  if (inside) memcpy(to, word, 16);
}
inline void store_32(void* to, uint32_t word, bool inside) {
  if (inside) memcpy(to, &word, 4);
}
inline void store_16(void* to, uint16_t half, bool inside) {
  if (inside) memcpy(to, &half, 2);
}

}  // namespace convmixer_fast::cuda
