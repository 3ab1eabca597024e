// Packing of the weights: the operands of a group of 2 M output channels for one chunk of k.
//
// A, 2 M channels x a chunk, is cut in the middle both ways into blocks of M x kc. Each operand, a block or
// a sum of two (strassen.h), is [M][row_stride]: the rows of M channels, which the micro-kernel broadcasts
// from. The copy of a band stays in L2 and is used by all panels of a tile.
#pragma once

#include "cpu/gemm/blocking_f32.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/gemm/strassen.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

// Rows of the weights that a band packs.
struct WeightRows {
  const float* first;
  int64_t stride;  // from row to row
  int64_t count;

  CMF_INLINE const float* operator()(int64_t i) const { return first + i * stride; }
};

// The weights of output channels from `first` on; rows past c_out are zeros.
template <int M, int64_t kRow>
CMF_INLINE void pack_operands(const PanelGemm& p, const Chunk& t, int64_t first, bool strassen,
                              bool direct, float* to) {
  const int64_t kc = t.kc;
  alignas(64) float none[kHalf];
  if (first + 2 * M > p.c_out) {
    for (int64_t k = 0; k < kc; ++k) none[k] = 0.0f;
  }
  for (int64_t m = 0; m < M; ++m) {
    const float* a[4];  // [row of blocks][column of blocks]
    for (int block = 0; block < 4; ++block) {
      const int64_t channel = first + block / 2 * M + m;
      a[block] = channel < p.c_out ? p.weight + channel * p.c_in + t.k0 + block % 2 * kc : none;
    }
    float* row = to + m * kRow;
    auto at = [&](Operand which) { return row + which * (M * kRow); };
    copy(a[0], at(kA11), kc);
    copy(a[3], at(kA22), t.rest);
    if (direct) {
      copy(a[1], at(kA12), t.rest);
      copy(a[2], at(kA21), kc);
    }
    if (!strassen) continue;
    auto sums = [&](int64_t k, auto load, auto store) __attribute__((always_inline)) {
      const auto w11 = load(a[0] + k), w12 = load(a[1] + k);
      const auto w21 = load(a[2] + k), w22 = load(a[3] + k);
      store(at(kA11A22) + k, w11 + w22);
      store(at(kA21A22) + k, w21 + w22);
      store(at(kA11A12) + k, w11 + w12);
      store(at(kA21A11) + k, w21 - w11);
      store(at(kA12A22) + k, w12 - w22);
    };
    int64_t k = 0;
    for (; k + kLanes <= kc; k += kLanes) {
      sums(k, [](const float* f) { return S::load(f); },
           [](float* f, Float v) { S::store(f, v); });
    }
    for (; k < kc; ++k) {
      sums(k, [](const float* f) { return *f; }, [](float* f, float v) { *f = v; });
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
