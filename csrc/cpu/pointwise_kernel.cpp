// The pointwise matrix product of one instruction set: compiled once for each (simd.h).
//
// for each group of M output channels
//   for each block of kBlock k                   its weights, M * kBlock floats, stay in L1
//     for each panel of the tile                 kPanel * kBlock floats from L2
//       M x 2 vectors of accumulators, from zero
//       for each k: 2 loads of the panel, M broadcasts of a weight, 2 * M multiply-adds
//       added to the tile's sums in L1
//   activation, scale, shift; M rows of z
//
// Registers: 2 * M accumulators, 2 of the panel, 1 broadcast (none where the multiply-add takes it
// from memory): M = 6 of 16 registers, 12 of 32. Per k an AVX2 machine issues 12 multiply-adds in
// 6 cycles and 8 loads in 4. Bytes from L2 per k: the panel's 8 * kLanes, against 6 (24) cycles.
// At c_in = 1536 a tile of kTile pixels is 393 KB of L2. The weights are read once a tile: 9.4 MB of
// L3 against 64 * 1536 * 1536 multiply-adds, 3 GB/s a core; each block is prefetched into L2 while
// the one before it is used.
// Blocks of k are also for accuracy: in one sum of 1536 terms the rounding errors are twice
// PyTorch's, in sums of 384 they are not above it.
#include "finish.h"
#include "pointwise.h"
#include "simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

using S = Simd<kLanes>;
using Float = S::Float;

constexpr int kPanel = 2 * kLanes;
constexpr int kRowsWide = kRegisters == 32 ? 12 : 6;
constexpr int kRowStep = kRowsWide / 3;
constexpr int kTile = 64;
constexpr int64_t kBlock = 384;
constexpr int64_t kPrefetch = 256;

// Rows of the group that begins at channel `first`: less than a whole one only at the end.
CMF_INLINE int64_t group_rows(int64_t first, int64_t c_out) {
  return min(kRowsWide, round_up(c_out - first, kRowStep));
}

int64_t packed_channels(int64_t c_out) { return round_up(c_out, kRowStep); }

void pack(const float* weight, int64_t c_out, int64_t c_in, float* packed) {
  for (int64_t first = 0; first < c_out; first += kRowsWide) {
    const int64_t rows = group_rows(first, c_out);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = packed + r;
      if (first + r < c_out) {
        const float* from = weight + (first + r) * c_in;
        for (int64_t k = 0; k < c_in; ++k) to[k * rows] = from[k];
      } else {
        for (int64_t k = 0; k < c_in; ++k) to[k * rows] = 0.0f;
      }
    }
    packed += rows * c_in;
  }
}

// tile[m][kPanel] = (bias given ? bias[m] : tile[m]) + sum_k weight[k][m] * panel[k][kPanel] for
// `count` k. Each k also prefetches from `ahead` on, `step` floats further every time.
template <int M>
CMF_INLINE void multiply(const float* panel, const float* weight, const float* bias, int64_t count,
                         const float* ahead, int64_t step, float* tile) {
  Float acc[M][2];
  static_for<M>([&](auto m) __attribute__((always_inline)) {
    constexpr int I = decltype(m)::value;
    acc[I][0] = acc[I][1] = Float{};
  });
  CMF_ROLLED
  for (int64_t k = 0; k < count; ++k) {
    // The hardware's own prefetchers stop at the ends of pages, every 32 or 64 turns.
    __builtin_prefetch(panel + kPrefetch);
    if (kPanel > 16) __builtin_prefetch(panel + kPrefetch + 16);
    __builtin_prefetch(ahead, 0, 2);
    const Float x0 = S::load(panel), x1 = S::load(panel + kLanes);
    static_for<M>([&](auto m) __attribute__((always_inline)) {
      constexpr int I = decltype(m)::value;
      const Float w = S::broadcast(weight[I]);
      acc[I][0] = w * x0 + acc[I][0];
      acc[I][1] = w * x1 + acc[I][1];
    });
    panel += kPanel;
    weight += M;
    ahead += step;
  }
  static_for<M>([&](auto m) __attribute__((always_inline)) {
    constexpr int I = decltype(m)::value;
    float* row = tile + I * kPanel;
    const Float b = bias != nullptr ? S::broadcast(bias[I]) : Float{};
    if (bias != nullptr) {
      S::store(row, acc[I][0] + b);
      S::store(row + kLanes, acc[I][1] + b);
    } else {
      S::store(row, acc[I][0] + S::load(row));
      S::store(row + kLanes, acc[I][1] + S::load(row + kLanes));
    }
  });
}

// Writes `count` pixels of row values, the first of them pixel `pixel` of all images.
CMF_INLINE void store_row(const Pointwise& p, const float* values, int64_t co, int64_t pixel,
                          int64_t count) {
  int64_t image = pixel / p.plane, at = pixel % p.plane;
  while (count > 0) {
    const int64_t run = min(count, p.plane - at);
    copy(values, p.z + (image * p.c_out + co) * p.plane + at, run);
    values += run;
    count -= run;
    at = 0;
    ++image;
  }
}

// scale * act(tile) + shift in place, for M rows of one panel.
template <int M>
CMF_INLINE void finish(const Pointwise& p, int64_t first, float* tile) {
  with_activation(p.act, [&](auto act) __attribute__((always_inline)) {
    constexpr Activation A = static_cast<Activation>(decltype(act)::value);
    // Two rows at a time: kGroup vectors in step.
    static_assert(kGroup == 4 && M % 2 == 0, "a group of vectors is two rows");
    for (int64_t m = 0; m < M; m += 2) {
      Float values[kGroup], scale[kGroup], shift[kGroup];
      static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
        constexpr int G = decltype(g)::value;
        values[G] = S::load(tile + m * kPanel + G * kLanes);
        scale[G] = S::broadcast(p.scale[first + m + G / 2]);
        shift[G] = S::broadcast(p.shift[first + m + G / 2]);
      });
      finish_group<A, kLanes>(values, scale, shift);
      static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
        constexpr int G = decltype(g)::value;
        S::store(tile + m * kPanel + G * kLanes, values[G]);
      });
    }
  });
}

// One group of output channels for the pixels of one tile.
template <int M>
__attribute__((noinline)) void group(const Pointwise& p, int64_t first, const float* weight,
                                     int64_t pixel_begin, int64_t pixel_end) {
  alignas(64) float tiles[M * kTile];
  const int64_t step = even_pieces(p.c_in, kBlock, 1);
  const int64_t share = ceil_div(M, ceil_div(pixel_end - pixel_begin, kPanel));
  for (int64_t k = 0; k < p.c_in; k += step) {
    const int64_t count = min(step, p.c_in - k);
    // While this block is used, the next one comes from L3, a share of it for each panel.
    const float* ahead = weight + (k + count) * M;
    float* tile = tiles;
    for (int64_t pixel = pixel_begin; pixel < pixel_end; pixel += kPanel, tile += M * kPanel) {
      multiply<M>(p.panels + pixel / kPanel * p.panel_stride + k * kPanel, weight + k * M,
                  k == 0 ? p.bias + first : nullptr, count, ahead, share, tile);
      ahead += count * share;
    }
  }
  const int64_t rows = min(M, p.c_out - first);
  float* tile = tiles;
  for (int64_t pixel = pixel_begin; pixel < pixel_end; pixel += kPanel, tile += M * kPanel) {
    finish<M>(p, first, tile);
    const int64_t count = min(kPanel, p.pixels - pixel);
    const int64_t at = pixel % p.plane;
    if (count == kPanel && at + kPanel <= p.plane) {
      float* z = p.z + (pixel / p.plane * p.c_out + first) * p.plane + at;
      for (int64_t m = 0; m < rows; ++m, z += p.plane) {
        S::store(z, S::load(tile + m * kPanel));
        S::store(z + kLanes, S::load(tile + m * kPanel + kLanes));
      }
    } else {
      for (int64_t m = 0; m < rows; ++m) {
        store_row(p, tile + m * kPanel, first + m, pixel, count);
      }
    }
  }
}

void run(const Pointwise& p, int64_t pixel_begin, int64_t pixel_end, int64_t group_begin,
         int64_t group_end) {
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int64_t first = g * kRowsWide;
    const float* weight = p.weight + first * p.c_in;
    switch (group_rows(first, p.c_out) / kRowStep) {
      case 3: group<kRowsWide>(p, first, weight, pixel_begin, pixel_end); break;
      case 2: group<2 * kRowStep>(p, first, weight, pixel_begin, pixel_end); break;
      default: group<kRowStep>(p, first, weight, pixel_begin, pixel_end); break;
    }
  }
}

}  // namespace

extern const PointwiseKernels pointwise_kernels;
const PointwiseKernels pointwise_kernels = {kPanel, kTile, kRowsWide, packed_channels, pack, run};

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
