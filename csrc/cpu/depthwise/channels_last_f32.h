// The channels-last depthwise kernel, float32: a vector is L neighbouring channels, a tile T neighbouring pixels.
//
//   for each tap (i, j): 1 load of the tap's weights, T multiply-adds with the pixels j .. j+T-1
//
// With 32 registers the T + K - 1 pixels of a row are loaded once for all K taps of that row: (T + 2K - 1) loads
// for T * K multiply-adds, 25 for 72 at T = 8, K = 9. With 16 registers each multiply-add reads its pixel from
// L1: T + 1 loads for T multiply-adds.
#pragma once

#include "cpu/depthwise/depthwise.h"
#include "cpu/depthwise/blocking_f32.h"
#include "cpu/epilogue.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

// scale * act(sum) + shift, for n vectors. All tiles share one copy of this function: it costs a store and a
// load of each vector, and keeps five activations out of every tile's code.
template <int L>
__attribute__((noinline)) void apply_epilogue(typename Simd<L>::Float* sums, int n, Activation act,
                                              const typename Simd<L>::Float& scale,
                                              const typename Simd<L>::Float& shift) {
  with_activation(act, [&](auto a) __attribute__((always_inline)) {
    CMF_ROLLED
    for (int i = 0; i < n; i += kGroup) {
      typename Simd<L>::Float group[kGroup];
      static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
        constexpr int I = decltype(g)::value;
        group[I] = sums[i + I];
      });
      activate<static_cast<Activation>(decltype(a)::value), L, kGroup>(group);
      static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
        constexpr int I = decltype(g)::value;
        sums[i + I] = group[I] * scale + shift;
      });
    }
  });
}

template <int L, int N>
CMF_INLINE void tile_epilogue(typename Simd<L>::Float (&acc)[N], Activation act,
                              const typename Simd<L>::Float& scale,
                              const typename Simd<L>::Float& shift) {
  constexpr int kSums = (N + kGroup - 1) / kGroup * kGroup;
  typename Simd<L>::Float sums[kSums] = {};
  static_for<N>([&](auto i) __attribute__((always_inline)) {
    constexpr int I = decltype(i)::value;
    sums[I] = acc[I];
  });
  apply_epilogue<L>(sums, kSums, act, scale, shift);
  static_for<N>([&](auto i) __attribute__((always_inline)) {
    constexpr int I = decltype(i)::value;
    acc[I] = sums[I];
  });
}

// One block of up to kLanes channels. Scratch and taps have kLanes channels, zeros in those that
// the image lacks; scratch rows have `cols_in` pixels.
struct ChannelsLastBlock {
  const float* scratch;
  int64_t cols_in;
  const float* weight;
  int64_t k;
  Simd<kLanes>::Float bias, scale, shift;
  Activation act;
  float* y;
  int64_t y_row, y_col;
  int64_t rows, cols, channels;
};

// T pixels at (row, col) of the block. K = 0: the kernel size is b.k.
template <int T, int K>
CMF_INLINE void channels_last_tile(const ChannelsLastBlock& b, int64_t row, int64_t col) {
  using S = Simd<kLanes>;
  using Float = S::Float;
  const int64_t k = K > 0 ? K : b.k;
  const int64_t line = b.cols_in * kLanes;
  const float* in = b.scratch + row * line + col * kLanes;
  constexpr bool kOneSum = K > 0 && kRegisters == 32;
  Float acc[T];
  static_for<T>([&](auto t) __attribute__((always_inline)) {
    acc[decltype(t)::value] = kOneSum ? b.bias : Float{};
  });

  const float* tap = b.weight;
  CMF_ROLLED
  for (int64_t i = 0; i < k; ++i) {
    const float* pixels = in + i * line;
    if constexpr (kOneSum) {
      Float x[T + K - 1];
      static_for<T + K - 1>([&](auto c) __attribute__((always_inline)) {
        constexpr int C = decltype(c)::value;
        x[C] = S::load(pixels + C * kLanes);
      });
      static_for<K>([&](auto j) __attribute__((always_inline)) {
        constexpr int J = decltype(j)::value;
        const Float w = S::load(tap + J * kLanes);
        static_for<T>([&](auto t) __attribute__((always_inline)) {
          constexpr int P = decltype(t)::value;
          acc[P] = x[J + P] * w + acc[P];
        });
      });
      tap += K * kLanes;
    } else {
      // A sum of its own for each kernel row and the bias last, as in planar_tile.
      Float line[T] = {};
      CMF_ROLLED
      for (int64_t j = 0; j < k; ++j, tap += kLanes) {
        const Float w = S::load(tap);
        static_for<T>([&](auto t) __attribute__((always_inline)) {
          constexpr int P = decltype(t)::value;
          line[P] = S::load(pixels + (j + P) * kLanes) * w + line[P];
        });
      }
      static_for<T>([&](auto t) __attribute__((always_inline)) {
        constexpr int P = decltype(t)::value;
        acc[P] = acc[P] + line[P];
      });
    }
  }
  if constexpr (!kOneSum) {
    static_for<T>([&](auto t) __attribute__((always_inline)) { acc[decltype(t)::value] += b.bias; });
  }

  tile_epilogue<kLanes>(acc, b.act, b.scale, b.shift);

  const int64_t before = (k - 1) / 2;
  const float* centre = in + before * line + before * kLanes;
  float* out = b.y + row * b.y_row + col * b.y_col;
  const int64_t pixels = b.cols - col;
  static_for<T>([&](auto t) __attribute__((always_inline)) {
    constexpr int P = decltype(t)::value;
    if (P >= pixels) return;
    const Float result = acc[P] + S::load(centre + P * kLanes);
    float* to = out + P * b.y_col;
    if (b.channels == kLanes) {
      S::store(to, result);
    } else {
      float lanes[kLanes];
      S::store(lanes, result);
      for (int64_t c = 0; c < b.channels; ++c) to[c] = lanes[c];
    }
  });
}

template <int T, int K>
__attribute__((noinline)) void channels_last_strip(const ChannelsLastBlock& b, int64_t col) {
  for (int64_t row = 0; row < b.rows; ++row) channels_last_tile<T, K>(b, row, col);
}

template <int K>
void channels_last_block(const ChannelsLastBlock& b) {
  for (int64_t col = 0; col < b.cols;) {
    const int64_t left = b.cols - col;
    if (left > kPixels / 2) {
      channels_last_strip<kPixels, K>(b, col);
      col += kPixels;
    } else if (left > 1) {
      channels_last_strip<kPixels / 2, K>(b, col);
      col += kPixels / 2;
    } else {
      channels_last_strip<1, K>(b, col);
      col += 1;
    }
  }
}

CMF_INLINE void copy_channels(const float* from, float* to, int64_t channels) {
  using S = Simd<kLanes>;
  if (channels == kLanes) {
    S::store(to, S::load(from));
  } else {
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
    for (int64_t c = channels; c < kLanes; ++c) to[c] = 0.0f;
  }
}

// Copies the block at (h0, w0) of the channels at `image` with its halo into the scratch.
void fill_channels_last(const DepthwiseMix& p, const float* image, int64_t h0, int64_t w0,
                        int64_t rows, int64_t cols, int64_t cols_in, int64_t channels,
                        float* scratch) {
  const int64_t before = (p.k - 1) / 2;
  const int64_t line = cols_in * kLanes;
  const Inside ys = inside(h0 - before, rows + p.k - 1, p.h);
  const Inside xs = inside(w0 - before, cols + p.k - 1, p.w);
  zero(scratch, ys.begin * line);
  for (int64_t r = ys.begin; r < ys.end; ++r) {
    float* to = scratch + r * line;
    const float* from = image + (h0 - before + r) * p.x_stride[2];
    zero(to, xs.begin * kLanes);
    for (int64_t c = xs.begin; c < xs.end; ++c) {
      copy_channels(from + (w0 - before + c) * p.x_stride[3], to + c * kLanes, channels);
    }
    zero(to + xs.end * kLanes, (cols_in - xs.end) * kLanes);
  }
  zero(scratch + ys.end * line, (rows + p.k - 1 - ys.end) * line);
}

void run_channels_last(const DepthwiseMix& p, const DepthwiseBlocks& blocks, int64_t begin,
                       int64_t end, float* scratch) {
  using S = Simd<kLanes>;
  const int64_t groups = ceil_div(p.c, kLanes);
  const int64_t down = ceil_div(p.h, blocks.rows), across = ceil_div(p.w, blocks.cols);
  float* taps = scratch;
  float* image = scratch + packed_taps(p.k);
  // Channel groups are the innermost index: neighbours share cache lines and pages.
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c0 = i % groups * kLanes, place = i / groups;
    const int64_t w0 = place % across * blocks.cols, h0 = place / across % down * blocks.rows;
    const int64_t n = place / across / down;
    ChannelsLastBlock b;
    b.channels = min(kLanes, p.c - c0);
    auto per_channel = [&](const float* values) {
      float lanes[kLanes] = {};
      if (values != nullptr) copy_channels(values + c0, lanes, b.channels);
      return S::load(lanes);
    };
    b.scratch = image;
    b.weight = taps;
    b.k = p.k;
    b.bias = per_channel(p.bias);
    b.scale = per_channel(p.scale);
    b.shift = per_channel(p.shift);
    b.act = p.act;
    b.y = p.y + n * p.y_stride[0] + c0 + h0 * p.y_stride[2] + w0 * p.y_stride[3];
    b.y_row = p.y_stride[2];
    b.y_col = p.y_stride[3];
    b.rows = min(blocks.rows, p.h - h0);
    b.cols = min(blocks.cols, p.w - w0);
    b.cols_in = channels_last_cols(b.cols, p.k);
    for (int64_t tap = 0; tap < p.k * p.k; ++tap) {
      copy_channels(p.weight + tap * p.c + c0, taps + tap * kLanes, b.channels);
    }
    fill_channels_last(p, p.x + n * p.x_stride[0] + c0, h0, w0, b.rows, b.cols, b.cols_in,
                       b.channels, image);
    switch (p.k) {
      case 3: channels_last_block<3>(b); break;
      case 5: channels_last_block<5>(b); break;
      case 7: channels_last_block<7>(b); break;
      case 9: channels_last_block<9>(b); break;
      default: channels_last_block<0>(b); break;
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
