// The depthwise kernels of one instruction set: compiled once for each (simd.h).
//
// Both layouts have the same shape. A block of output pixels is copied with its halo of k - 1 rows
// and columns into a zero-padded scratch; from there every tile is computed alike, with no test
// for the image's border and no mask, and only the store knows where the block ends. The copy
// moves about one value for each value computed, against k * k multiply-adds; where a block is a
// whole plane, the zeros around it are written once for all channels.
//
// planar: a vector is L neighbouring pixels of a row; a tile is R rows x V vectors of accumulators.
//   for each tap column j
//     for each input row r of the tile's R + K - 1
//       1 broadcast of tap (r, j), which then serves R rows; V loads of the input row, shifted by j
//       for each output row t that has r in its window: V multiply-adds with tap (r - t, j)
//   One load serves up to R output rows and one broadcast R * V multiply-adds. At R = 4, V = 2,
//   K = 9: 24 loads and 9 broadcasts for 72 multiply-adds; 8 accumulators hide a latency of 4 cycles
//   at 2 multiply-adds a cycle. Registers: R * V accumulators + R taps + V, 14 of 16.
//   A vector of AVX-512 is a cache line, and 15 of 16 shifted loads read two. R = 16, V = 1: 24 loads,
//   which count twice, and 9 broadcasts for 144 multiply-adds; R = 8, V = 2 has 32 loads for as many.
//   Registers: 16 + 9 + 1 of 32.
//   Meanwhile the next plane is asked for: a plane is often just a page, where prefetchers end.
//   The sums of a block lie in L1 when the activation, scale, shift and residual pass over them.
//
// channels-last: a vector is L neighbouring channels; a tile is T neighbouring pixels.
//   for each tap (i, j): 1 load of the tap's weights, T multiply-adds with the pixels j .. j+T-1
//   With 32 registers the T + K - 1 pixels of a row are loaded once for all K taps of that row:
//   (T + 2K - 1) loads for T * K multiply-adds, 25 for 72 at T = 8, K = 9. With 16 registers each
//   multiply-add reads its pixel from L1: T + 1 loads for T multiply-adds.
#include "cpu/depthwise/depthwise.h"
#include "cpu/epilogue.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

// Narrow rows and the right ends of wide ones use vectors of half the width.
constexpr int kHalfLanes = kLanes > 4 ? kLanes / 2 : kLanes;
constexpr int kWideRows = kRegisters == 32 ? 8 : 4;  // rows of a tile two vectors wide
constexpr int kRows = 8;                             // rows of a tile one vector wide
constexpr int kTallRows = kWide ? 16 : kRows;        // rows of a tall one
constexpr int kPixels = 8;                           // pixels of a channels-last tile

constexpr int64_t kPlanarCols = 256;
constexpr int64_t kPlanarScratchFloats = 6144;     // 24 KB: with the output row it fits in L1
constexpr int64_t kChannelsLastCols = 32;
constexpr int64_t kChannelsLastScratchFloats = 16384;  // 64 KB: L2; a window of k rows fits in L1

// Floats from one scratch row to the next: an odd number of cache lines, so that the rows of a
// window spread over all sets of L1 instead of meeting in a few.
int64_t planar_stride(int64_t cols, int64_t k) {
  const int64_t lines = ceil_div(round_up(cols, 2 * kLanes) + k - 1, 16);
  return (lines | 1) * 16;
}
int64_t planar_scratch_rows(int64_t rows, int64_t k) { return round_up(rows, kRows) + k - 1; }

int64_t channels_last_cols(int64_t cols, int64_t k) { return round_up(cols, kPixels) + k - 1; }
int64_t packed_taps(int64_t k) { return round_up(k * k * kLanes, 16); }

DepthwiseBlocks blocks(const DepthwiseMix& p, Layout layout) {
  DepthwiseBlocks b;
  if (layout == Layout::planar) {
    b.channels = 1;
    b.cols = even_pieces(p.w, kPlanarCols, 2 * kLanes);
    const int64_t stride = planar_stride(b.cols, p.k);
    b.rows = even_pieces(p.h, max(kPlanarScratchFloats / stride - p.k, 2 * kRows), kRows);
    b.scratch_floats = planar_scratch_rows(b.rows, p.k) * stride;
  } else {
    b.channels = kLanes;
    b.cols = even_pieces(p.w, kChannelsLastCols, kPixels);
    const int64_t row = channels_last_cols(b.cols, p.k) * kLanes;
    b.rows = even_pieces(p.h, max(kChannelsLastScratchFloats / row - p.k, 4), 1);
    b.scratch_floats = packed_taps(p.k) + (b.rows + p.k - 1) * row;
  }
  b.count = p.n * ceil_div(p.c, b.channels) * ceil_div(p.h, b.rows) * ceil_div(p.w, b.cols);
  return b;
}

CMF_INLINE void zero(float* to, int64_t n) {
  using S = Simd<kLanes>;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) S::store(to + i, typename S::Float{});
  for (; i < n; ++i) to[i] = 0.0f;
}

// The part of [first, first + length) that lies in [0, limit), as offsets from `first`.
struct Inside {
  int64_t begin, end;
};
CMF_INLINE Inside inside(int64_t first, int64_t length, int64_t limit) {
  const int64_t begin = min(max(-first, 0), length);
  return {begin, max(min(limit - first, length), begin)};
}

// scale * act(sum) + shift, for n vectors. One copy of it serves all tiles: it costs a store and a
// load of each vector, and keeps five activations out of every tile's code.
template <int L>
__attribute__((noinline)) void finish(typename Simd<L>::Float* sums, int n, Activation act,
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
CMF_INLINE void epilogue(typename Simd<L>::Float (&acc)[N], Activation act,
                         const typename Simd<L>::Float& scale,
                         const typename Simd<L>::Float& shift) {
  constexpr int kSums = (N + kGroup - 1) / kGroup * kGroup;
  typename Simd<L>::Float sums[kSums] = {};
  static_for<N>([&](auto i) __attribute__((always_inline)) {
    constexpr int I = decltype(i)::value;
    sums[I] = acc[I];
  });
  finish<L>(sums, kSums, act, scale, shift);
  static_for<N>([&](auto i) __attribute__((always_inline)) {
    constexpr int I = decltype(i)::value;
    acc[I] = sums[I];
  });
}

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
  const float* next;  // the same block of the next plane, which is asked for meanwhile
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
    // Each kernel row is summed by itself first: of k * k terms in one sum, 961 at k = 31, the
    // rounding errors would be twice PyTorch's. The bias comes last, as there: where a map is one
    // column, rows are single terms, and each would be rounded as the bias is.
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
        // As long as more rows are left than a tile that is not tall has.
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

// Copies the block at (h0, w0) with its halo into the scratch, zeros outside the image. With
// `zeros` those are there already: from another plane's block at the same place.
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
CMF_INLINE void finish_vectors(const float* sums, const float* x, const Simd<kLanes>::Float& scale,
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

// The same in the place of `count` neighbouring sums.
template <Activation A>
void finish_row(float* y, const float* x, int64_t count, float scale, float shift) {
  using S = Simd<kLanes>;
  const S::Float scales = S::broadcast(scale), shifts = S::broadcast(shift);
  auto group = [&](float* at, const float* residual, auto g) __attribute__((always_inline)) {
    constexpr int G = decltype(g)::value;
    S::Float values[G];
    finish_vectors<A, G>(at, residual, scales, shifts, values);
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
        finish_row<static_cast<Activation>(decltype(a)::value)>(
            y + r * p.y_stride[2], x + r * p.x_stride[2], cols, p.scale[c], p.shift[c]);
      }
    });
  }
}

// y of one plane, from its sums and its x, into the panels of its channel. Past the caches where other cores
// have read those lines and will read them next: each would have to let go of its copy first. Of 1024 x 256
// values a Zen 4 core wrote half in 85 us so, in 260 us where the other core shares no L3 with it, in 50 us
// past the caches; reading all of them took 18, 26-38 and 28-37 us.
template <Activation A, bool Shared>
void finish_panels(const float* sums, const float* x, int64_t pixels, float scale, float shift,
                   float* panel, int64_t panel_stride) {
  using S = Simd<kLanes>;
  const S::Float scales = S::broadcast(scale), shifts = S::broadcast(shift);
  auto group = [&](const float* from, const float* residual, auto g) __attribute__((always_inline)) {
    constexpr int G = decltype(g)::value;
    S::Float values[G];
    finish_vectors<A, G>(from, residual, scales, shifts, values);
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
  // What lies past the last pixel is multiplied and thrown away; zeros are never slow numbers.
  zero(to + pixels - i, kPanel - pixels + i);
}

void run_panels(const DepthwiseMix& p, const DepthwiseBlocks& blocks, int64_t begin, int64_t end,
                float* scratch, float* sums, float* panels, int64_t panel_stride, bool shared) {
  const int64_t count = ceil_div(p.h, blocks.rows) * ceil_div(p.w, blocks.cols);
  for (int64_t c = begin; c < end; ++c) {
    // The channel's lines of the panels, each in a page of its own, are asked for before they are
    // written.
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
      const auto finish = shared ? finish_panels<A, true> : finish_panels<A, false>;
      finish(sums, residual, p.h * p.w, p.scale[c], p.shift[c], panels + c * kPanel, panel_stride);
    });
  }
  if (shared) streamed();
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

  epilogue<kLanes>(acc, b.act, b.scale, b.shift);

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

void run(const DepthwiseMix& p, Layout layout, const DepthwiseBlocks& blocks, int64_t begin,
         int64_t end, float* scratch) {
  if (layout == Layout::planar) {
    run_planar(p, blocks, begin, end, scratch);
  } else {
    run_channels_last(p, blocks, begin, end, scratch);
  }
}

}  // namespace

extern const DepthwiseKernels depthwise_kernels;
const DepthwiseKernels depthwise_kernels = {blocks, run, run_panels};

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
