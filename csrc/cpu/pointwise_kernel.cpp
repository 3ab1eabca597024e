// The pointwise matrix product of one instruction set: compiled once for each (simd.h).
//
// for each chunk of input channels                  of Strassen's sums of its panels, made once
//   for each band of 4 (M = 12: 2) groups of 2 * M output channels
//     its weights of the chunk, or Strassen's sums of them, into [M][k] operands: L2
//     for each product of half matrices
//       for each panel of the tile                  from L3 into L2, once a band
//         for each group of the band: M output channels, half a chunk of k
//           M x 2 vectors of accumulators, from zero
//           for each k: 2 loads of the panel, M broadcasts of a weight, 2 * M multiply-adds
//     added to the tile's sums; after the last chunk: bias, activation, scale, shift, rows of z
//
// Registers: 2 * M accumulators, 2 of the panel, 1 broadcast (none where the multiply-add takes it
// from memory): M = 6 of 16 registers, 12 of 32. Per k an AVX2 machine issues 12 multiply-adds and
// 8 loads: 6 and 4 cycles, or 12 and 8 where a vector is two halves.
//
// Strassen's algorithm, one level, on 2 x 2 blocks: A is 2 * M channels x a chunk of weights, B the
// chunk x two panels, each cut in the middle both ways.
//   P0 = (A11 + A22)(B11 + B22)   P1 = (A21 + A22) B11   P2 = A11 (B12 - B22)   P3 = A22 (B21 - B11)
//   P4 = (A11 + A12) B22   P5 = (A21 - A11)(B11 + B12)   P6 = (A12 - A22)(B21 + B22)
//   C11 += P0 + P3 - P4 + P6   C12 += P2 + P4   C21 += P1 + P3   C22 += P0 - P1 + P2 + P5
// 7 multiplications of 8. What the sums cost: those of B once a tile and chunk, for all c_out; those
// of A once a tile, 5 additions and 7 stores against 7 * kTile / 2 multiply-adds; those of C 18
// additions, loads and stores against 7 * kc multiply-adds. Together 3 to 4 %, so that 1.14 becomes
// 1.10. Winograd's form has 15 sums for these 18, but its errors grow by half as much again. A
// second level would make 49 multiplications of 64, but four times the rounding error of one.
//
// Where the data are, AVX2, c_in = 1024: a tile's panels and sums of a chunk are 7 * 512 * 128
// floats, 1.8 MB, in L3. Read for every group alone that would be 64 bytes a k and 12 multiply-adds,
// 13 GB/s of L3 a core, which other programs may not leave; a band reads them once for 4 groups and
// asks for the next panel (32 KB) while its last group multiplies. A band's operands (344 KB) and
// products (86 KB) stay in L2. The weights come from memory once a tile: 4 bytes against kTile
// multiply-adds, 0.6 GB/s at 40 GMAC/s; the next band's are asked for while this one multiplies.
//
// No sum is longer than 256 terms, for accuracy: in one sum of 1536 the rounding errors of the direct
// product are twice PyTorch's, in sums of 256 they are not above it; Strassen's are then twice them.
#include "finish.h"
#include "pointwise.h"
#include "simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

using S = Simd<kLanes>;
using Float = S::Float;

constexpr int kRows = kRegisters == 32 ? 12 : 6;  // M of whole groups
constexpr int kRowStep = kRows / 3;               // M of the last group is a multiple of this
constexpr int kTile = 256;
constexpr int kPanels = kTile / kPanel;
// Groups that take turns with a panel while it is in L2: 48 channels.
constexpr int kBand = 24 / kRows;
constexpr int64_t kHalf = 512;  // most k of half a chunk
constexpr int64_t kSum = 256;   // most terms of one sum

// What the operands of a group are, in the order of the products that use them; then what only the
// direct product uses.
enum Operand { kA11A22, kA21A22, kA11, kA22, kA11A12, kA21A11, kA12A22, kA12, kA21, kOperands };
constexpr int kProducts = 7;
// Sums of a pair of panels.
enum PairSum { kB11B22, kB12B22, kB21B11, kB11B12, kB21B22, kPairSums };

bool strassen_pays(int64_t c_in, int64_t c_out, int64_t plane) {
  return c_in % 2 == 0 && c_in >= 256 && c_out >= 2 * kRows && plane > kPanel;
}

// The same cut of the input channels for every tile: equal even pieces.
int64_t chunk_length(int64_t c_in) { return even_pieces(c_in, 2 * kHalf, 2); }

// One tile's memory.
struct Scratch {
  float* sums;      // [kPairSums][pair][kc][kPanel]
  float* operands;  // [group of the band][kOperands][M][kHalf]
  float* products;  // [group of the band][pair][kProducts][M][kPanel]
  float* results;   // [group][panel][2 M][kPanel], of one band where there is one chunk

  static constexpr int64_t kSums = kPanels / 2 * kPairSums * kHalf * kPanel;
  static constexpr int64_t kBandOperands = int64_t{kBand} * kOperands * kRows * kHalf;
  static constexpr int64_t kBandProducts = kBand * (kPanels / 2) * kProducts * kRows * kPanel;

  explicit Scratch(float* at)
      : sums(at),
        operands(sums + kSums),
        products(operands + kBandOperands),
        results(products + kBandProducts) {}
};
constexpr int64_t kGroupFloats = int64_t{2} * kRows * kTile;

int64_t scratch_floats(int64_t c_in, int64_t c_out) {
  const int64_t groups = chunk_length(c_in) < c_in ? ceil_div(c_out, 2 * kRows) : kBand;
  return Scratch::kSums + Scratch::kBandOperands + Scratch::kBandProducts + groups * kGroupFloats;
}

// Asks for rows of memory that are needed soon, some lines at a time, into L2.
struct Ahead {
  const float* row;
  int64_t stride, rows, lines;  // of what is left
  int64_t line;

  // Lines for each of `turns` turns.
  CMF_INLINE int64_t share(int64_t turns) const { return ceil_div(rows * lines, turns); }

  CMF_INLINE void some(int64_t count) {
    for (; count > 0 && rows > 0; --count) {
      __builtin_prefetch(row + line * 16, 0, 2);
      if (++line == lines) {
        line = 0;
        row += stride;
        --rows;
      }
    }
  }
};

// out[m][kPanel] = (add: out +) sum_k weight[m][k] * panel[k][kPanel]. Asks for the panel at `next`.
template <int M>
CMF_INLINE void multiply(const float* panel, const float* weight, int64_t count, const float* next,
                         bool add, float* out) {
  const int64_t pieces = max(ceil_div(count, kSum), 1), piece = ceil_div(count, pieces);
  for (int64_t left = count; left >= 0; left -= piece, add = true) {
    Float acc[M][2];
    static_for<M>([&](auto m) __attribute__((always_inline)) {
      constexpr int I = decltype(m)::value;
      acc[I][0] = acc[I][1] = Float{};
    });
    const float* end = weight + min(piece, left);
    CMF_ROLLED
    for (; weight != end; ++weight, panel += kPanel, next += kPanel) {
      __builtin_prefetch(next, 0, 2);
      if (kPanel > 16) __builtin_prefetch(next + 16, 0, 2);
      const Float x0 = S::load(panel), x1 = S::load(panel + kLanes);
      static_for<M>([&](auto m) __attribute__((always_inline)) {
        constexpr int I = decltype(m)::value;
        const Float w = S::broadcast(weight[I * kHalf]);
        acc[I][0] = w * x0 + acc[I][0];
        acc[I][1] = w * x1 + acc[I][1];
      });
    }
    if (add) {
      static_for<M>([&](auto m) __attribute__((always_inline)) {
        constexpr int I = decltype(m)::value;
        acc[I][0] += S::load(out + I * kPanel);
        acc[I][1] += S::load(out + I * kPanel + kLanes);
      });
    }
    static_for<M>([&](auto m) __attribute__((always_inline)) {
      constexpr int I = decltype(m)::value;
      S::store(out + I * kPanel, acc[I][0]);
      S::store(out + I * kPanel + kLanes, acc[I][1]);
    });
    if (left <= piece) return;
  }
}

// A chunk of input channels of one tile. Where it has an odd channel more, the first half has it, and
// all is direct.
struct Chunk {
  int64_t pixel, panels;  // where the tile begins, and how many panels it has
  int64_t k0, kc, rest;   // first input channel; channels of either half
  bool first, last;
  bool strassen;
};

// The weights of a group and a chunk as operands; rows past c_out are zeros.
template <int M>
CMF_INLINE void pack_operands(const Pointwise& p, const Chunk& t, int64_t first, bool strassen,
                              bool direct, float* to) {
  const int64_t k0 = t.k0, kc = t.kc;
  for (int64_t m = 0; m < M; ++m) {
    alignas(64) float none[kHalf];
    const bool top = first + m < p.c_out, bottom = first + M + m < p.c_out;
    if (!top || !bottom) {
      for (int64_t k = 0; k < kc; ++k) none[k] = 0.0f;
    }
    const float* a1 = p.weight + (first + m) * p.c_in + k0;
    const float* a2 = a1 + M * p.c_in;
    const float* a11 = top ? a1 : none;
    const float* a12 = top ? a1 + kc : none;
    const float* a21 = bottom ? a2 : none;
    const float* a22 = bottom ? a2 + kc : none;
    float* row = to + m * kHalf;
    auto at = [&](Operand which) { return row + which * (M * kHalf); };
    copy(a11, at(kA11), kc);
    copy(a22, at(kA22), t.rest);
    if (direct) {
      copy(a12, at(kA12), t.rest);
      copy(a21, at(kA21), kc);
    }
    if (strassen) {
      int64_t k = 0;
      for (; k + kLanes <= kc; k += kLanes) {
        const Float w11 = S::load(a11 + k), w12 = S::load(a12 + k);
        const Float w21 = S::load(a21 + k), w22 = S::load(a22 + k);
        S::store(at(kA11A22) + k, w11 + w22);
        S::store(at(kA21A22) + k, w21 + w22);
        S::store(at(kA11A12) + k, w11 + w12);
        S::store(at(kA21A11) + k, w21 - w11);
        S::store(at(kA12A22) + k, w12 - w22);
      }
      for (; k < kc; ++k) {
        at(kA11A22)[k] = a11[k] + a22[k];
        at(kA21A22)[k] = a21[k] + a22[k];
        at(kA11A12)[k] = a11[k] + a12[k];
        at(kA21A11)[k] = a21[k] - a11[k];
        at(kA12A22)[k] = a12[k] - a22[k];
      }
    }
  }
}

// Where a pair of panels has its blocks, for a chunk.
struct Pair {
  const float *b11, *b12, *b21, *b22;
};
CMF_INLINE Pair pair_at(const float* panel, int64_t stride, int64_t kc) {
  return {panel, panel + stride, panel + kc * kPanel, panel + stride + kc * kPanel};
}

// To `to`, and from one kind of sum to the next `step` floats further.
void pair_sums(const Pair& b, int64_t kc, int64_t step, float* to) {
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

// The results of a pair's two panels, [2 M][kPanel] each, from its products.
template <int M>
CMF_INLINE void combine(const float* products, bool add, float* left, float* right) {
  constexpr int kSize = M * kPanel;
  for (int i = 0; i < kSize; i += kLanes) {
    Float p[kProducts];
    static_for<kProducts>([&](auto n) __attribute__((always_inline)) {
      constexpr int I = decltype(n)::value;
      p[I] = S::load(products + I * kSize + i);
    });
    Float c11 = (p[0] - p[4]) + (p[3] + p[6]), c12 = p[2] + p[4];
    Float c21 = p[1] + p[3], c22 = (p[0] - p[1]) + (p[2] + p[5]);
    if (add) {
      c11 += S::load(left + i);
      c12 += S::load(right + i);
      c21 += S::load(left + kSize + i);
      c22 += S::load(right + kSize + i);
    }
    S::store(left + i, c11);
    S::store(right + i, c12);
    S::store(left + kSize + i, c21);
    S::store(right + kSize + i, c22);
  }
}

// Per output channel of a group; zeros past c_out.
struct Vectors {
  float bias[2 * kRows], scale[2 * kRows], shift[2 * kRows];
};

// scale * act(result + bias) + shift of `rows` rows of one panel, into z.
CMF_INLINE void finish_panel(const Pointwise& p, const Vectors& v, int64_t first, int64_t rows,
                             int64_t pixel, float* result) {
  const int64_t pixels = min(kPanel, p.plane - pixel);
  with_activation(p.act, [&](auto act) __attribute__((always_inline)) {
    constexpr Activation A = static_cast<Activation>(decltype(act)::value);
    // kGroup vectors in step. Rows past the last one are there, but not stored.
    constexpr int kStep = kGroup / 2;
    static_assert(2 * kRowStep % kStep == 0, "results have whole groups of rows");
    for (int64_t m = 0; m < rows; m += kStep) {
      Float values[kGroup];
      static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
        constexpr int G = decltype(g)::value;
        values[G] = S::load(result + m * kPanel + G * kLanes) + S::broadcast(v.bias[m + G / 2]);
      });
      activate<A, kLanes, kGroup>(values);
      static_for<kStep>([&](auto r) __attribute__((always_inline)) {
        constexpr int R = decltype(r)::value;
        const Float scale = S::broadcast(v.scale[m + R]), shift = S::broadcast(v.shift[m + R]);
        const Float z0 = values[2 * R] * scale + shift, z1 = values[2 * R + 1] * scale + shift;
        if (m + R >= rows) return;
        float* z = p.z + (first + m + R) * p.plane + pixel;
        if (pixels == kPanel) {
          S::store(z, z0);
          S::store(z + kLanes, z1);
        } else {
          float row[kPanel];
          S::store(row, z0);
          S::store(row + kLanes, z1);
          for (int64_t i = 0; i < pixels; ++i) z[i] = row[i];
        }
      });
    }
  });
}

// `count` groups of output channels from `first` on, for one chunk.
template <int M>
__attribute__((noinline)) void band(const Pointwise& p, const Chunk& t, int64_t first,
                                    int64_t count, const Scratch& scratch, float* results,
                                    Ahead ahead) {
  constexpr int64_t kOperand = M * kHalf, kResult = int64_t{2} * M * kPanel;
  constexpr int64_t kProduct = M * kPanel, kGroupProducts = kPanels / 2 * kProducts * kProduct;
  const float* panels = p.panels + t.k0 * kPanel;
  const int64_t pairs = t.strassen ? t.panels / 2 : 0;
  const bool direct = 2 * pairs < t.panels;
  for (int64_t g = 0; g < count; ++g) {
    pack_operands<M>(p, t, first + g * (2 * M), pairs > 0, direct,
                     scratch.operands + g * (kOperands * kOperand));
  }
  // What comes from L3 or memory is asked for while this band multiplies: the next band's weights,
  // and for the end of this function the sums of the earlier chunks.
  const int64_t turns = count * (kProducts * pairs + 4 * (t.panels - 2 * pairs));
  const int64_t share = ahead.share(turns);
  Ahead own = {};
  if (!t.first) own = {results, kGroupFloats, count, t.panels * kResult / 16, 0};
  const int64_t own_share = own.share(turns);

  if (pairs > 0) {
    const int64_t sum = t.kc * kPanel, kind = kPanels / 2 * sum;
    // The right-hand factor of a product for a pair.
    auto factor = [&](int product, int64_t i) {
      const Pair b = pair_at(panels + 2 * i * p.panel_stride, p.panel_stride, t.kc);
      const float* sums = scratch.sums + i * sum;
      const float* const all[kProducts] = {sums + kB11B22 * kind, b.b11, sums + kB12B22 * kind,
                                           sums + kB21B11 * kind, b.b22, sums + kB11B12 * kind,
                                           sums + kB21B22 * kind};
      return all[product];
    };
    const float* b = factor(0, 0);
    for (int product = 0; product < kProducts; ++product) {
      for (int64_t i = 0; i < pairs; ++i) {
        const float* next = i + 1 < pairs                 ? factor(product, i + 1)
                            : product + 1 < kProducts ? factor(product + 1, 0)
                                                      : factor(0, 0);
        for (int64_t g = 0; g < count; ++g) {
          ahead.some(share);
          own.some(own_share);
          multiply<M>(
              b, scratch.operands + (g * kOperands + product) * kOperand, t.kc,
              g + 1 == count ? next : b, false,
              scratch.products + g * kGroupProducts + (i * kProducts + product) * kProduct);
        }
        b = next;
      }
    }
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t i = 0; i < pairs; ++i) {
        float* left = results + g * kGroupFloats + 2 * i * kResult;
        combine<M>(scratch.products + g * kGroupProducts + i * (kProducts * kProduct), !t.first,
                   left, left + kResult);
      }
    }
  }
  for (int64_t i = 2 * pairs; i < t.panels; ++i) {
    const float* b1 = panels + i * p.panel_stride;
    const float* b2 = b1 + t.kc * kPanel;
    const float* next = i + 1 < t.panels ? b1 + p.panel_stride : b1;
    auto half = [&](const float* b, Operand top, Operand bottom, int64_t kc, const float* then,
                    bool add) {
      for (int64_t g = 0; g < count; ++g) {
        ahead.some(2 * share);
        own.some(2 * own_share);
        const float* a = scratch.operands + g * (kOperands * kOperand);
        float* out = results + g * kGroupFloats + i * kResult;
        multiply<M>(b, a + top * kOperand, kc, b, add, out);
        multiply<M>(b, a + bottom * kOperand, kc, then, add, out + kProduct);
      }
    };
    half(b1, kA11, kA21, t.kc, b2, !t.first);
    half(b2, kA12, kA22, t.rest, next, true);
  }
  if (!t.last) return;

  for (int64_t g = 0; g < count; ++g) {
    const int64_t channel = first + g * (2 * M), rows = min(2 * M, p.c_out - channel);
    Vectors v = {};
    for (int64_t m = 0; m < rows; ++m) {
      v.bias[m] = p.bias != nullptr ? p.bias[channel + m] : 0.0f;
      v.scale[m] = p.scale[channel + m];
      v.shift[m] = p.shift[channel + m];
    }
    for (int64_t i = 0; i < t.panels; ++i) {
      finish_panel(p, v, channel, rows, t.pixel + i * kPanel,
                   results + g * kGroupFloats + i * kResult);
    }
  }
}

void run(const Pointwise& p, int64_t pixel_begin, int64_t pixel_end, int64_t group_begin,
         int64_t group_end, float* memory) {
  const Scratch scratch(memory);
  const int64_t length = chunk_length(p.c_in);
  Chunk t;
  t.pixel = pixel_begin;
  t.panels = ceil_div(pixel_end - pixel_begin, kPanel);
  t.strassen = p.strassen && strassen_pays(p.c_in, p.c_out, p.plane);
  for (t.k0 = 0; t.k0 < p.c_in; t.k0 += length) {
    t.rest = min(length, p.c_in - t.k0) / 2;
    t.kc = min(length, p.c_in - t.k0) - t.rest;
    t.first = t.k0 == 0;
    t.last = t.k0 + length >= p.c_in;
    if (t.strassen) {
      const float* panels = p.panels + t.k0 * kPanel;
      for (int64_t i = 0; i + 1 < t.panels; i += 2) {
        pair_sums(pair_at(panels + i * p.panel_stride, p.panel_stride, t.kc), t.kc,
                  kPanels / 2 * t.kc * kPanel, scratch.sums + i / 2 * t.kc * kPanel);
      }
    }
    for (int64_t g = group_begin; g < group_end;) {
      const int64_t first = g * (2 * kRows);
      // A last group that is not whole is a band by itself.
      const int64_t whole = (p.c_out - first) / (2 * kRows);
      const int64_t count = whole > 0 ? min(min(kBand, whole), group_end - g) : 1;
      float* results = scratch.results;
      if (length < p.c_in) results += (g - group_begin) * kGroupFloats;
      Ahead ahead = {};
      if (g + count < group_end) {
        const int64_t next = first + count * (2 * kRows);
        ahead = {p.weight + next * p.c_in + t.k0, p.c_in,
                 min(kBand * 2 * kRows, p.c_out - next), ceil_div(t.kc + t.rest, 16), 0};
      }
      const int64_t rows = min(2 * kRows, p.c_out - first);
      switch (ceil_div(rows, 2 * kRowStep)) {
        case 3: band<kRows>(p, t, first, count, scratch, results, ahead); break;
        case 2: band<2 * kRowStep>(p, t, first, count, scratch, results, ahead); break;
        default: band<kRowStep>(p, t, first, count, scratch, results, ahead); break;
      }
      g += count;
    }
  }
}

}  // namespace

extern const PointwiseKernels pointwise_kernels;
const PointwiseKernels pointwise_kernels = {kPanel,         kTile, 2 * kRows, strassen_pays,
                                            scratch_floats, run};

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
