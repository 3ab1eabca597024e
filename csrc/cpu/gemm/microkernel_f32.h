// The float32 micro-kernel: M output channels x V vectors of pixels, summed over k in registers.
//
//   out[m][pixel] = (add: out[m][pixel] +) sum_k weight[m][k] * panel[k][pixel]
//
// for each k: V loads of the panel, M broadcasts of a weight, M * V multiply-adds
//
// One source for all instruction sets; the constants below are what differs.
//
// Registers: M * V accumulators, V of the panel, 1 broadcast (none where the multiply-add reads it from
// memory): V = 2, M = 6 of 16 registers, 12 of 32. Per k an AVX2 machine issues 12 multiply-adds and 8
// loads: 6 and 4 cycles, or 12 and 8 where a vector is two halves.
// AVX-512: V = 4, M = 6: 10 loads for 24 multiply-adds; V = 2, M = 12 has 14. An Ice Lake core whose other
// hyperthread is busy started 2.4 instructions and 1 vector load a cycle, against 2 multiply-adds: the
// instruction count is the limit there.
//
// No sum is longer than 64 terms, for accuracy: the errors of n terms of random sign, added one after the
// other, grow like n, those of pieces like the square root of their number. In pieces of 64 the direct GEMM
// has half of PyTorch's rms error; a level of Strassen's algorithm doubles it.
#pragma once

#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

using S = Simd<kLanes>;
using Float = S::Float;

constexpr int kRows = kRegisters / 8 * 6 / kVectors;  // M of whole groups
constexpr int kRowStep = kRows / 3;                   // M of the last group is a multiple of this
constexpr int64_t kSum = 64;                          // most terms of one sum
// Terms between two checks for the end of a sum: few enough checks for branch prediction.
constexpr int kTerms = 8;
// Floats that a term prefetches: a cache line, or a panel's row where that is less.
constexpr int64_t kAsked = kPanel < 16 ? kPanel : 16;
// Terms of a panel that the groups of a band take turns with: where a row is four cache lines, half a chunk
// exceeds L1. Otherwise a piece is the whole half chunk (kHalf, blocking_f32.h).
constexpr int64_t kPiece = kWide ? kSum : 512;

// GCC 12 spills in this loop: with AVX-512 if it is a function of its own (24 of 312 instructions), otherwise
// if it is inlined. tests/benchmarks/test_counts.py checks the latter.
#if defined(__AVX512F__)
#define CMF_LOOP CMF_INLINE
#else
#define CMF_LOOP __attribute__((noinline))
#endif

// out[m][V of kVectors] = (add: out +) sum_k weight[m][k] * panel[k][V of kVectors]. The rows of the weights
// are kRow floats apart, or `stride` where kRow is 0. Prefetches: with kAsks, kAsked floats at `next` a term;
// 2 * count floats at `ahead`, or `count` of each of M rows that are `stride` apart. They are spread over the
// loop, a line at a time: a processor stalls on many outstanding requests.
template <int M, int V, int64_t kRow, bool kAsks>
CMF_INLINE void multiply_vectors(const float* panel, const float* weight, int64_t count,
                                 const float* next, const float* ahead, bool add, float* out,
                                 int64_t stride = kRow) {
  constexpr bool kInPlace = kRow == 0;
  do {
    Float acc[M * V] = {};
    const float* rows[M] = {};
    // Opaque row pointers: GCC otherwise keeps the offset of every weight of a step, and spills them.
    auto find_rows = [&]() __attribute__((always_inline)) {
      static_for<kInPlace ? M : 0>([&](auto m) __attribute__((always_inline)) {
        constexpr int I = decltype(m)::value;
        rows[I] = weight + I * stride;
        asm("" : "+r"(rows[I]));
      });
    };
    auto term = [&](int64_t k) __attribute__((always_inline)) {
      if (kAsks) __builtin_prefetch(next + k * kAsked, 0, kPiece == kSum ? 3 : 2);
      Float x[V];
      static_for<V>([&](auto v) __attribute__((always_inline)) {
        constexpr int I = decltype(v)::value;
        x[I] = S::load(panel + k * kPanel + I * kLanes);
      });
      static_for<M>([&](auto m) __attribute__((always_inline)) {
        constexpr int I = decltype(m)::value;
        const Float w = S::broadcast(kInPlace ? rows[I][k] : weight[I * kRow + k]);
        static_for<V>([&](auto v) __attribute__((always_inline)) {
          constexpr int N = decltype(v)::value;
          S::accumulate(acc[I * V + N], w, x[N]);
        });
      });
    };
    auto step = [&](int64_t terms) __attribute__((always_inline)) {
      panel += terms * kPanel;
      next += terms * kAsked;
      weight += terms;
      ahead += kInPlace ? terms : 2 * terms;
    };
    const float* end = weight + min(kSum, count);
    CMF_ROLLED
    while (end - weight >= kTerms) {
      static_for<kInPlace ? M : 1>([&](auto m) __attribute__((always_inline)) {
        __builtin_prefetch(ahead + decltype(m)::value * stride, 0, 2);
      });
      find_rows();
      static_for<kTerms>([&](auto k) __attribute__((always_inline)) { term(decltype(k)::value); });
      step(kTerms);
    }
    CMF_ROLLED
    while (weight != end) {
      find_rows();
      term(0);
      step(1);
    }
    if (add) {
      static_for<M * V>([&](auto i) __attribute__((always_inline)) {
        constexpr int I = decltype(i)::value;
        acc[I] += S::load(out + I / V * kPanel + I % V * kLanes);
      });
    }
    static_for<M * V>([&](auto i) __attribute__((always_inline)) {
      constexpr int I = decltype(i)::value;
      S::store(out + I / V * kPanel + I % V * kLanes, acc[I]);
    });
    add = true;
    count -= kSum;
  } while (kPiece > kSum && count > 0);
}

template <int M, int64_t kRow, bool kAsks>
CMF_LOOP void multiply_whole(const float* panel, const float* weight, int64_t count,
                             const float* next, const float* ahead, bool add, float* out) {
  multiply_vectors<M, kVectors, kRow, kAsks>(panel, weight, count, next, ahead, add, out);
}

// The last panel of a plane may be partly empty: only its V occupied vectors are multiplied.
template <int M, int V, int64_t kRow>
__attribute__((noinline)) void multiply_part(const float* panel, const float* weight, int64_t count,
                                             const float* next, const float* ahead, bool add,
                                             float* out) {
  multiply_vectors<M, V, kRow, true>(panel, weight, count, next, ahead, add, out);
}

// Reads the rows of the weights from PyTorch's tensor, `stride` apart: no copy.
template <int M, int V>
__attribute__((noinline)) void multiply_in_place(const float* panel, const float* weight,
                                                 int64_t stride, int64_t count, const float* ahead,
                                                 bool add, float* out) {
  multiply_vectors<M, V, 0, false>(panel, weight, count, panel, ahead, add, out, stride);
}

// Calls f(Index<V>) with the number of a panel's vectors as a constant.
template <class F>
CMF_INLINE void with_vectors(int64_t vectors, F&& f) {
  static_for<kVectors>([&](auto v) __attribute__((always_inline)) {
    constexpr int V = decltype(v)::value + 1;
    if (vectors == V) f(Index<V>{});
  });
}

// The micro-kernel for `groups` groups of M rows, which take turns with each piece of the panel. The last of
// them prefetch the next piece, after the last piece the one at `next`; on AVX2 no others do, because a
// Zen 3 core whose other hyperthread is busy started 1.6 loads a cycle, and a turn without prefetches has 8
// for its 6 cycles. weight(g), ahead(g), out(g): of a group.
template <int M, int V, int64_t kRow, class Weight, class Ahead, class Out>
CMF_INLINE void multiply_groups(const float* panel, int64_t count, const float* next, int64_t groups,
                                Weight weight, Ahead ahead, bool add, Out out) {
  constexpr int64_t kParts = kPanel / kAsked;  // of a term
  for (int64_t k = 0; k < count; k += kPiece) {
    const int64_t terms = min(kPiece, count - k);
    const float* piece = panel + k * kPanel;
    const float* then = k + terms < count ? piece + terms * kPanel : next;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t part = g - max(groups - kParts, 0);
      const float* asked = part < 0 ? piece : then + part * terms * kAsked;
      auto run = [&](auto asks) __attribute__((always_inline)) {
        if constexpr (V == kVectors) {
          multiply_whole<M, kRow, decltype(asks)::value != 0>(
              piece, weight(g) + k, terms, asked, ahead(g) + 2 * k, add || k > 0, out(g));
        } else {
          multiply_part<M, V, kRow>(piece, weight(g) + k, terms, asked, ahead(g) + 2 * k, add || k > 0,
                                    out(g));
        }
      };
      if (kWide || V < kVectors || part >= 0) {
        run(Index<1>{});
      } else {
        run(Index<0>{});
      }
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
