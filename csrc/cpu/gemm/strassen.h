// One level of Strassen's algorithm on 2 x 2 blocks, float32.
//
// A is 2 M channels x a chunk of weights, B the chunk x a pair of panels, each cut in the middle both ways.
//   P0 = (A11 + A22)(B11 + B22)   P1 = (A21 + A22) B11   P2 = A11 (B12 - B22)   P3 = A22 (B21 - B11)
//   P4 = (A11 + A12) B22   P5 = (A21 - A11)(B11 + B12)   P6 = (A12 - A22)(B21 + B22)
//   C11 += P0 + P3 - P4 + P6   C12 += P2 + P4   C21 += P1 + P3   C22 += P0 - P1 + P2 + P5
// 7 multiplications of 8. Winograd's form has 15 sums for these 18, but its errors are larger by half.
//
// The sums of B are made once a tile for all c_out, those of A once a tile and band (pack_f32.h), those of C
// as the epilogue reads the products (store_f32.h), or added to the results of earlier chunks.
//
// Values that are not finite would spread in the sums to the pixels of the other panel: panels that hold one
// are multiplied directly.
#pragma once

#include "cpu/gemm/microkernel_f32.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

// The operands of a group, in the order of the products that use them; the last two are used only by the
// direct GEMM.
enum Operand { kA11A22, kA21A22, kA11, kA22, kA11A12, kA21A11, kA12A22, kA12, kA21, kOperands };
constexpr int kProducts = 7;
// Sums of a pair of panels.
enum PairSum { kB11B22, kB12B22, kB21B11, kB11B12, kB21B22, kPairSums };

// Where a pair of panels has its blocks, for a chunk.
struct Pair {
  const float *b11, *b12, *b21, *b22;
};
CMF_INLINE Pair pair_at(const float* panel, int64_t stride, int64_t kc) {
  return {panel, panel + stride, panel + kc * kPanel, panel + stride + kc * kPanel};
}

// The sums of a pair; from one kind of sum to the next it is `step` floats.
CMF_INLINE void pair_sums(const Pair& b, int64_t kc, int64_t step, float* to) {
  const int64_t count = kc * kPanel;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float b11 = S::load(b.b11 + i), b12 = S::load(b.b12 + i);
    const Float b21 = S::load(b.b21 + i), b22 = S::load(b.b22 + i);
    S::store(to + kB11B22 * step + i, b11 + b22);
    S::store(to + kB12B22 * step + i, b12 - b22);
    S::store(to + kB21B11 * step + i, b21 - b11);
    S::store(to + kB11B12 * step + i, b11 + b12);
    S::store(to + kB21B22 * step + i, b21 + b22);
  }
}

// The right-hand factor of a product; `sums` are those of the pair, as pair_sums lays them out.
CMF_INLINE const float* factor(int product, const Pair& b, const float* sums, int64_t step) {
  const float* const all[kProducts] = {sums + kB11B22 * step, b.b11, sums + kB12B22 * step,
                                       sums + kB21B11 * step, b.b22, sums + kB11B12 * step,
                                       sums + kB21B22 * step};
  return all[product];
}

// A vector of what a pair's products add up to; from one product to the next it is `size` floats.
struct Sums {
  Float c11, c12, c21, c22;
};
CMF_INLINE Sums product_sums(const float* products, int64_t size) {
  Float p[kProducts];
  static_for<kProducts>([&](auto n) __attribute__((always_inline)) {
    constexpr int I = decltype(n)::value;
    p[I] = S::load(products + I * size);
  });
  return {(p[0] - p[4]) + (p[3] + p[6]), p[2] + p[4], p[1] + p[3], (p[0] - p[1]) + (p[2] + p[5])};
}

// The products of a pair, stored as or added to the results of its two panels, [2 M][kPanel] each.
template <int M>
CMF_INLINE void combine(const float* products, float* left, float* right, bool add) {
  constexpr int kSize = M * kPanel;
  for (int i = 0; i < kSize; i += kLanes, left += kLanes, right += kLanes) {
    auto [c11, c12, c21, c22] = product_sums(products + i, kSize);
    if (add) {
      c11 += S::load(left);
      c12 += S::load(right);
      c21 += S::load(left + kSize);
      c22 += S::load(right + kSize);
    }
    S::store(left, c11);
    S::store(right, c12);
    S::store(left + kSize, c21);
    S::store(right + kSize, c22);
  }
}

// Whether all values of a panel are finite.
bool finite(const float* panel, int64_t c_in) {
  Float sums[4] = {};
  int64_t i = 0;
  const int64_t count = c_in * kPanel;
  // 0 * NaN and 0 * infinity are NaN, and a sum stays NaN.
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    static_for<4>([&](auto n) __attribute__((always_inline)) {
      constexpr int I = decltype(n)::value;
      sums[I] += 0.0f * S::load(panel + i + I * kLanes);
    });
  }
  for (; i < count; i += kLanes) sums[0] += 0.0f * S::load(panel + i);
  const Float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(sum[lane] == 0.0f)) return false;
  }
  return true;
}

}  // namespace
}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
