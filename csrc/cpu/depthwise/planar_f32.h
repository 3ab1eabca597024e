// The planar depthwise kernel, float32: a vector is L neighbouring pixels of a row, a tile R rows x V vectors of
// accumulators.
//
//   for each tap column j
//     for each input row r of the tile's R + K - 1
//       1 broadcast of tap (r, j), for all R rows; V loads of the input row, shifted by j
//       for each output row t that has r in its window: V multiply-adds with tap (r - t, j)
//
// One load is used by up to R output rows and one broadcast by R * V multiply-adds. At R = 4, V = 2, K = 9:
// 24 loads and 9 broadcasts for 72 multiply-adds; 8 accumulators hide a latency of 4 cycles at 2 multiply-adds
// a cycle. Registers: R * V accumulators + R taps + V, 14 of 16.
// A vector of AVX-512 is a cache line, and 15 of 16 shifted loads read two. R = 16, V = 1: 24 loads, which
// count twice, and 9 broadcasts for 144 multiply-adds; R = 8, V = 2 has 32 loads for as many. Registers:
// 16 + 9 + 1 of 32.
// The next plane is prefetched meanwhile: a plane is often a single page, where hardware prefetchers stop.
// The sums of a block lie in L1 when the activation, scale, shift and residual pass over them.
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/depthwise/blocking_f32.h"
#include "cpu/epilogue.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

// One block of one plane: its scratch, its taps, and where its sums go.
struct PlanarBlock {
  const float* scratch;
  int64_t stride;
  const float* weight;
  int64_t k;
  float bias;
  float* sums;
  int64_t sums_row;
  int64_t rows, cols;
  const float* next;  // the same block of the next plane, which is prefetched meanwhile
  int64_t next_row;
};

// R x V * L outputs at (row, col) of the block. K = 0: the kernel size is b.k.
template <int L, int R, int V, int K>
CMF_INLINE void planar_tile(const PlanarBlock& b, int64_t row, int64_t col) {
  using S = Simd<L>;
  using Float = typename S::Float;
  const int64_t k = K > 0 ? K : b.k;
  const float* in = b.scratch + row * b.stride + col;
  Float acc[R * V];
  static_for<R * V>([&](auto i) __attribute__((always_inline)) {
    acc[decltype(i)::value] = K > 0 ? S::broadcast(b.bias) : Float{};
  });

  if constexpr (K > 0) {
    constexpr int kAhead = (R + K - 1) / K;  // rows of the next plane's tile for each tap column
    const float* next = b.next + row * b.next_row + col;
    CMF_ROLLED
    for (int64_t j = 0; j < K; ++j) {
      static_for<kAhead>([&](auto) __attribute__((always_inline)) {
        static_for<(V * L + 15) / 16>([&](auto line) __attribute__((always_inline)) {
          __builtin_prefetch(next + decltype(line)::value * 16, 0, 3);
        });
        next += b.next_row;
      });
      Float taps[K];
      static_for<R + K - 1>([&](auto r) __attribute__((always_inline)) {
        constexpr int I = decltype(r)::value;
        if constexpr (I < K) taps[I] = S::broadcast(b.weight[I * K + j]);
        const float* line = in + I * b.stride + j;
        Float x[V];
        static_for<V>([&](auto v) __attribute__((always_inline)) {
          x[decltype(v)::value] = S::load(line + decltype(v)::value * L);
        });
        static_for<R>([&](auto t) __attribute__((always_inline)) {
          constexpr int T = decltype(t)::value;
          if constexpr (I >= T && I - T < K) {
            static_for<V>([&](auto v) __attribute__((always_inline)) {
              constexpr int N = decltype(v)::value;
              S::accumulate(acc[T * V + N], x[N], taps[I - T]);
            });
          }
        });
      });
    }
  } else {
    // Each kernel row is summed by itself first: with k * k terms in one sum, 961 at k = 31, the rounding
    // errors would be twice PyTorch's. The bias is added last, as in PyTorch: in a map of one column, rows
    // are single terms, and each would be rounded at the bias's magnitude.
    const float* tap = b.weight;
    CMF_ROLLED
    for (int64_t i = 0; i < k; ++i) {
      Float line[R * V] = {};
      CMF_ROLLED
      for (int64_t j = 0; j < k; ++j, ++tap) {
        const Float w = S::broadcast(*tap);
        static_for<R * V>([&](auto n) __attribute__((always_inline)) {
          constexpr int N = decltype(n)::value;
          const float* at = in + (i + N / V) * b.stride + j + N % V * L;
          line[N] = S::load(at) * w + line[N];
        });
      }
      static_for<R * V>([&](auto n) __attribute__((always_inline)) {
        constexpr int N = decltype(n)::value;
        acc[N] = acc[N] + line[N];
      });
    }
    static_for<R * V>([&](auto i) __attribute__((always_inline)) {
      acc[decltype(i)::value] += S::broadcast(b.bias);
    });
  }

  float* out = b.sums + row * b.sums_row + col;
  const int64_t rows = b.rows - row, cols = b.cols - col;
  static_for<R>([&](auto t) __attribute__((always_inline)) {
    constexpr int T = decltype(t)::value;
    if (T >= rows) return;
    static_for<V>([&](auto v) __attribute__((always_inline)) {
      constexpr int N = decltype(v)::value;
      float* to = out + T * b.sums_row + N * L;
      if (cols >= (N + 1) * L) {
        S::store(to, acc[T * V + N]);
      } else if (cols > N * L) {
        S::store_first(to, acc[T * V + N], cols - N * L);
      }
    });
  });
}

template <int L, int R, int V, int K>
__attribute__((noinline)) void planar_strip(const PlanarBlock& b, int64_t row, int64_t end,
                                            int64_t col) {
  for (; row < end; row += R) planar_tile<L, R, V, K>(b, row, col);
}

template <int K>
void planar_block(const PlanarBlock& b) {
  for (int64_t col = 0; col < b.cols;) {
    const int64_t left = b.cols - col;
    if (left > kLanes && (kTallRows == kRows || K == 0)) {
      planar_strip<kLanes, kWideRows, 2, K>(b, 0, b.rows, col);
      col += 2 * kLanes;
    } else if (left > kHalfLanes || kHalfLanes == kLanes) {
      int64_t row = 0;
      if constexpr (kTallRows > kRows) {
        // Tall tiles while more rows are left than a plain tile has.
        row = (b.rows + kTallRows - kRows - 1) / kTallRows * kTallRows;
        planar_strip<kLanes, kTallRows, 1, K>(b, 0, row, col);
      }
      planar_strip<kLanes, kRows, 1, K>(b, row, b.rows, col);
      col += kLanes;
    } else {
      planar_strip<kHalfLanes, kRows, 1, K>(b, 0, b.rows, col);
      col += kHalfLanes;
    }
  }
}

// Copies the block at (h0, w0) with its halo into the scratch, zeros outside the image. With `zeros` those
// are already there, from another plane's block at the same place.
void fill_planar(const DepthwiseMix& p, const float* plane, int64_t h0, int64_t w0, int64_t rows,
                 int64_t cols, int64_t stride, bool zeros, float* scratch) {
  const int64_t before = (p.k - 1) / 2;
  const Inside ys = inside(h0 - before + p.above, rows + p.k - 1, p.above + p.h + p.below);
  const Inside xs = inside(w0 - before + p.left, cols + p.k - 1, p.left + p.w + p.right);
  if (!zeros) zero(scratch, planar_scratch_rows(rows, p.k) * stride);
  for (int64_t r = ys.begin; r < ys.end; ++r) {
    copy(plane + (h0 - before + r) * p.x_stride[2] + w0 - before + xs.begin,
         scratch + r * stride + xs.begin, xs.end - xs.begin);
  }
}

// The sums of block i of channel c of image n, into rows of `sums_row` floats.
void planar_sums(const DepthwiseMix& p, const DepthwiseBlocks& blocks, int64_t n, int64_t c,
                 int64_t i, bool zeros, float* scratch, float* sums, int64_t sums_row) {
  const int64_t across = ceil_div(p.w, blocks.cols);
  const int64_t h0 = i / across * blocks.rows, w0 = i % across * blocks.cols;
  PlanarBlock b;
  b.scratch = scratch;
  b.weight = p.weight + c * p.k * p.k;
  b.k = p.k;
  b.bias = p.bias != nullptr ? p.bias[c] : 0.0f;
  b.sums = sums + h0 * sums_row + w0;
  b.sums_row = sums_row;
  b.rows = min(blocks.rows, p.h - h0);
  b.cols = min(blocks.cols, p.w - w0);
  b.stride = planar_stride(b.cols, p.k);
  const float* plane = p.x + n * p.x_stride[0] + c * p.x_stride[1];
  b.next = plane + p.x_stride[1] + h0 * p.x_stride[2] + w0;
  b.next_row = p.x_stride[2];
  fill_planar(p, plane, h0, w0, b.rows, b.cols, b.stride, zeros, scratch);
  switch (p.k) {
    case 3: planar_block<3>(b); break;
    case 5: planar_block<5>(b); break;
    case 7: planar_block<7>(b); break;
    case 9: planar_block<9>(b); break;
    default: planar_block<0>(b); break;
  }
}

// y = x + scale * act(sums) + shift on G vectors.
template <Activation A, int G>
CMF_INLINE void epilogue_vectors(const float* sums, const float* x, const Simd<kLanes>::Float& scale,
                               const Simd<kLanes>::Float& shift, Simd<kLanes>::Float (&y)[G]) {
  using S = Simd<kLanes>;
  static_for<G>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    y[I] = S::load(sums + I * kLanes);
  });
  activate<A, kLanes, G>(y);
  static_for<G>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    y[I] = y[I] * scale + shift + S::load(x + I * kLanes);
  });
}

// The same in place, on `count` neighbouring sums.
template <Activation A>
void epilogue_row(float* y, const float* x, int64_t count, float scale, float shift) {
  using S = Simd<kLanes>;
  const S::Float scales = S::broadcast(scale), shifts = S::broadcast(shift);
  auto group = [&](float* at, const float* residual, auto g) __attribute__((always_inline)) {
    constexpr int G = decltype(g)::value;
    S::Float values[G];
    epilogue_vectors<A, G>(at, residual, scales, shifts, values);
    static_for<G>([&](auto v) __attribute__((always_inline)) {
      constexpr int I = decltype(v)::value;
      S::store(at + I * kLanes, values[I]);
    });
  };
  int64_t i = 0;
  CMF_ROLLED
  for (; i + kGroup * kLanes <= count; i += kGroup * kLanes) group(y + i, x + i, Index<kGroup>{});
  CMF_ROLLED
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) group(y + i, x + i, Index<2>{});
  if (i == count) return;
  float last[2 * kLanes] = {}, residual[2 * kLanes] = {};
  copy(y + i, last, count - i);
  copy(x + i, residual, count - i);
  group(last, residual, Index<2>{});
  copy(last, y + i, count - i);
}

void run_planar(const DepthwiseMix& p, const DepthwiseBlocks& blocks, int64_t begin, int64_t end,
                float* scratch) {
  const int64_t down = ceil_div(p.h, blocks.rows), across = ceil_div(p.w, blocks.cols);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = i / (down * across), n = plane / p.c, c = plane % p.c;
    const int64_t at = i % (down * across), h0 = at / across * blocks.rows;
    const int64_t w0 = at % across * blocks.cols;
    float* y = p.y + n * p.y_stride[0] + c * p.y_stride[1];
    planar_sums(p, blocks, n, c, at, i > begin && down * across == 1, scratch, y, p.y_stride[2]);
    const float* x = p.x + n * p.x_stride[0] + c * p.x_stride[1] + h0 * p.x_stride[2] + w0;
    y += h0 * p.y_stride[2] + w0;
    int64_t rows = min(blocks.rows, p.h - h0), cols = min(blocks.cols, p.w - w0);
    if (p.x_stride[2] == cols && p.y_stride[2] == cols) {
      cols *= rows;
      rows = 1;
    }
    with_activation(p.act, [&](auto a) __attribute__((always_inline)) {
      for (int64_t r = 0; r < rows; ++r) {
        epilogue_row<static_cast<Activation>(decltype(a)::value)>(
            y + r * p.y_stride[2], x + r * p.x_stride[2], cols, p.scale[c], p.shift[c]);
      }
    });
  }
}

// y of one plane, from its sums and its x, into the panels of its channel. Past the caches if other cores have
// read those lines and will read them next: a store into the caches would have to invalidate their copies
// first. Of 1024 x 256 values a Zen 4 core wrote half in 85 us through the caches, in 260 us where the other
// core shares no L3 with it, in 50 us past the caches; reading all of them took 18, 26-38 and 28-37 us.
template <Activation A, bool Shared>
void epilogue_to_panels(const float* sums, const float* x, int64_t pixels, float scale, float shift,
                   float* panel, int64_t panel_stride) {
  using S = Simd<kLanes>;
  const S::Float scales = S::broadcast(scale), shifts = S::broadcast(shift);
  auto group = [&](const float* from, const float* residual, auto g) __attribute__((always_inline)) {
    constexpr int G = decltype(g)::value;
    S::Float values[G];
    epilogue_vectors<A, G>(from, residual, scales, shifts, values);
    static_for<G>([&](auto v) __attribute__((always_inline)) {
      constexpr int I = decltype(v)::value;
      float* to = panel + I / kVectors * panel_stride + I % kVectors * kLanes;
      if constexpr (Shared) {
        S::stream(to, values[I]);
      } else {
        S::store(to, values[I]);
      }
    });
    panel += G / kVectors * panel_stride;
  };
  int64_t i = 0;
  CMF_ROLLED
  for (; i + kGroup * kLanes <= pixels; i += kGroup * kLanes) {
    group(sums + i, x + i, Index<kGroup>{});
  }
  CMF_ROLLED
  for (; i + kPanel <= pixels; i += kPanel) group(sums + i, x + i, Index<kVectors>{});
  if (i == pixels) return;
  float last[kPanel] = {}, residual[kPanel] = {};
  copy(sums + i, last, pixels - i);
  copy(x + i, residual, pixels - i);
  float* to = panel;
  group(last, residual, Index<kVectors>{});
  // The lanes past the last pixel are multiplied and discarded; zeros are never denormal.
  zero(to + pixels - i, kPanel - pixels + i);
}

void run_panels(const DepthwiseMix& p, const DepthwiseBlocks& blocks, int64_t begin, int64_t end,
                float* scratch, float* sums, float* panels, int64_t panel_stride, bool shared) {
  const int64_t count = ceil_div(p.h, blocks.rows) * ceil_div(p.w, blocks.cols);
  for (int64_t c = begin; c < end; ++c) {
    // The channel's lines of the panels, each in a page of its own, are prefetched before they are written.
    for (int64_t i = 0; !shared && i < p.h * p.w; i += kPanel) {
      const float* panel = panels + i / kPanel * panel_stride + c * kPanel;
      static_for<kPanel / 16>([&](auto l) __attribute__((always_inline)) {
        __builtin_prefetch(panel + decltype(l)::value * 16, 1, 3);
      });
    }
    for (int64_t i = 0; i < count; ++i) {
      planar_sums(p, blocks, 0, c, i, c > begin && count == 1, scratch, sums, p.w);
    }
    const float* residual = p.x + c * p.x_stride[1];
    if (p.x_stride[2] != p.w && p.h > 1) {
      float* plane = sums + p.h * p.w;
      for (int64_t r = 0; r < p.h; ++r) copy(residual + r * p.x_stride[2], plane + r * p.w, p.w);
      residual = plane;
    }
    with_activation(p.act, [&](auto a) __attribute__((always_inline)) {
      constexpr Activation A = static_cast<Activation>(decltype(a)::value);
      const auto epilogue = shared ? epilogue_to_panels<A, true> : epilogue_to_panels<A, false>;
      epilogue(sums, residual, p.h * p.w, p.scale[c], p.shift[c], panels + c * kPanel, panel_stride);
    });
  }
  if (shared) streamed();
}

}  // namespace
}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
