// The epilogue of the GEMM: bias, activation, scale and shift on results or products in L1 or L2, stored as
// planar rows of z.
//
//   z[co,p] = scale[co] * act(result[co,p] + bias[co]) + shift[co]
//
// for each step of kGroup vectors (rows of 4 output channels, or the same row of the four blocks of a pair)
//   loads and sums, the activation of all in step, multiply-adds, stores
#pragma once

#include "cpu/epilogue.h"
#include "cpu/gemm/blocking_f32.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/gemm/strassen.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

// The vectors of a group, a value an output channel; zeros past c_out.
struct GroupVectors {
  float bias[kGroupRows], scale[kGroupRows], shift[kGroupRows];
};

// scale * act(result + bias) + shift of `rows` rows of one panel's first V vectors, into z.
template <int V>
__attribute__((noinline)) void store_panel(const PanelGemm& p, const GroupVectors& v, int64_t first,
                                           int64_t rows, int64_t image, int64_t pixel,
                                           const float* result) {
  const int64_t pixels = min(kPanel, p.plane - pixel);
  with_activation(p.act, [&](auto act) __attribute__((always_inline)) {
    constexpr Activation A = static_cast<Activation>(decltype(act)::value);
    // kGroup vectors in step, or those of 4 rows. Rows past the last one are computed, but not stored.
    constexpr int kStep = min(4, kGroup / V), kValues = kStep * V;
    static_assert(2 * kRowStep % kStep == 0, "results have whole groups of rows");
    for (int64_t m = 0; m < rows; m += kStep) {
      Float values[kValues];
      static_for<kValues>([&](auto g) __attribute__((always_inline)) {
        constexpr int G = decltype(g)::value;
        values[G] = S::load(result + (m + G / V) * kPanel + G % V * kLanes) +
                    S::broadcast(v.bias[m + G / V]);
      });
      activate<A, kLanes, kValues>(values);
      static_for<kStep>([&](auto r) __attribute__((always_inline)) {
        constexpr int R = decltype(r)::value;
        const Float scale = S::broadcast(v.scale[m + R]), shift = S::broadcast(v.shift[m + R]);
        if (m + R >= rows) return;
        float* z = p.z + (image * p.c_out + first + m + R) * p.z_stride + pixel;
        alignas(64) float row[kPanel];
        float* to = pixels == kPanel ? z : row;
        static_for<V>([&](auto v) __attribute__((always_inline)) {
          constexpr int I = decltype(v)::value;
          S::store(to + I * kLanes, values[R * V + I] * scale + shift);
        });
        if (pixels < kPanel) copy(row, z, pixels);
      });
    }
  });
}

// The same for a pair of panels, whose results are the sums of its products, of `half` output channels each,
// and, unless it is null, of `results`, [2][2 * half][kPanel].
__attribute__((noinline)) void store_pair(const PanelGemm& p, const GroupVectors& v, int64_t first,
                                          int64_t rows, int64_t half, int64_t image, int64_t pixel,
                                          const float* products, const float* results) {
  constexpr int kBlocks = 4, kStep = kGroup / kBlocks;  // kStep: vectors of a row of a block
  const int64_t size = half * kPanel, pixels = p.plane - pixel;
  with_activation(p.act, [&](auto act) __attribute__((always_inline)) {
    constexpr Activation A = static_cast<Activation>(decltype(act)::value);
    for (int64_t i = 0; i < size; i += kStep * kLanes) {
      const int64_t row = i / kPanel, column = i % kPanel;
      Float values[kGroup];  // [block][vector]
      static_for<kStep>([&](auto n) __attribute__((always_inline)) {
        constexpr int N = decltype(n)::value;
        const Sums sums = product_sums(products + i + N * kLanes, size);
        values[N] = sums.c11;
        values[kStep + N] = sums.c12;
        values[2 * kStep + N] = sums.c21;
        values[3 * kStep + N] = sums.c22;
      });
      static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
        constexpr int G = decltype(g)::value, B = G / kStep, N = G % kStep;
        if (results != nullptr) {
          values[G] += S::load(results + (B % 2 * 2 + B / 2) * size + i + N * kLanes);
        }
        values[G] += S::broadcast(v.bias[row + B / 2 * half]);
      });
      activate<A, kLanes, kGroup>(values);
      static_for<kBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int B = decltype(block)::value;
        const int64_t channel = row + B / 2 * half, at = B % 2 * kPanel + column;
        if (channel >= rows) return;
        const Float scale = S::broadcast(v.scale[channel]), shift = S::broadcast(v.shift[channel]);
        float* z = p.z + (image * p.c_out + first + channel) * p.z_stride + pixel + at;
        static_for<kStep>([&](auto n) __attribute__((always_inline)) {
          constexpr int N = decltype(n)::value;
          const Float value = values[B * kStep + N] * scale + shift;
          const int64_t there = pixels - at - N * kLanes;
          if (there >= kLanes) {
            S::store(z + N * kLanes, value);
          } else {
            S::store_first(z + N * kLanes, value, there);
          }
        });
      });
    }
  });
}

}  // namespace
}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
