// The pointwise matrix product of one instruction set: compiled once for each (simd.h).
//
// for each chunk of input channels
//   for each product of the outer level               one, the whole, where there is none
//     Strassen's sums of the tile's panels, made once
//     for each band of 4 (M = 12: 2) groups of 2 * M output channels, of 4 * M with an outer level
//       its weights of the chunk, or Strassen's sums of them, into [M][k] operands: L2
//       for each 8 sets of panels                     whose products stay in L2
//         for each product of half matrices
//           for each panel                            from L3 into L2, once a band
//             for each piece of its half chunk of k   AVX-512: of 64, in L1; else one, the whole
//               for each group of the band: M output channels
//                 M x V vectors of accumulators, from zero
//                 for each k: V loads of the panel, M broadcasts of a weight, M * V multiply-adds
//         added to the tile's sums, or, where they are complete then: bias, activation, scale, shift, rows of z
//
// Of the last panel of a plane only the vectors that hold pixels are multiplied: V of them. Where they are
// not all of its vectors the panel goes directly, which is as fast then: Strassen's algorithm saves a quarter
// of one panel of a pair.
//
// Registers: M * V accumulators, V of the panel, 1 broadcast (none where the multiply-add takes it
// from memory): V = 2, M = 6 of 16 registers, 12 of 32. Per k an AVX2 machine issues 12 multiply-adds
// and 8 loads: 6 and 4 cycles, or 12 and 8 where a vector is two halves.
// AVX-512: V = 4, M = 6: 10 loads for 24 multiply-adds, where V = 2, M = 12 has 14. An Ice Lake core
// whose other hyperthread is busy was seen to start 2.4 instructions and 1 load of a vector a cycle,
// against 2 multiply-adds: what counts there are instructions.
//
// Strassen's algorithm on 2 x 2 blocks: A is 2 * M channels x a chunk of weights, B the chunk x two
// panels, each cut in the middle both ways.
//   P0 = (A11 + A22)(B11 + B22)   P1 = (A21 + A22) B11   P2 = A11 (B12 - B22)   P3 = A22 (B21 - B11)
//   P4 = (A11 + A12) B22   P5 = (A21 - A11)(B11 + B12)   P6 = (A12 - A22)(B21 + B22)
//   C11 += P0 + P3 - P4 + P6   C12 += P2 + P4   C21 += P1 + P3   C22 += P0 - P1 + P2 + P5
// 7 multiplications of 8. Winograd's form has 15 sums for these 18, but its errors grow by half as
// much again. With an outer level the same is done twice, 49 multiplications of 64: each outer
// product is an inner one whose A and B are themselves sums, made in registers on the way to the
// inner sums, and whose result goes to one or two quarters of C.
//
// What the sums of two levels cost an AVX2 machine whose vectors are two halves, c_in = c_out =
// 1024, in cycles of the multiply-adds' 100: those of B 1, made once a tile for all c_out; those of A
// 1.6, 9 additions and 7 stores a vector for the 32 panels of a tile; those of C 1.6.
//
// Where the data are, AVX2, c_in = 1024, two levels: the sums of a tile's panels for one outer product
// are 7 * 256 * 128 floats, 0.9 MB, in L3. Read for every group alone that would be 64 bytes a k and
// 12 multiply-adds, 13 GB/s of L3 a core, which other programs may not leave; a band reads them once
// for 4 groups and asks for the next panel (16 KB) while its last group multiplies. A band's operands
// (172 KB) and products (86 KB) stay in L2. The weights come from memory three times a tile, 12 bytes
// against 0.77 kTile multiply-adds, 0.6 GB/s at 20 GMAC/s; the tile's sums in C (2 MB) as often and
// back, 0.6 GB/s. Both are asked for a band ahead.
//
// No sum is longer than 64 terms, for accuracy: the errors of n terms of random sign, added one after
// the other, grow like n, those of pieces like the square root of their number. In pieces of 64 the
// direct product has half of PyTorch's rms error; each level of Strassen's algorithm doubles it.
//
// AVX-512 multiplies directly below 3072 channels where it starts two whole vectors a cycle: multiply-adds
// are so fast then that Strassen's sums, 2.5 times a panel's bytes, are not there in time. On Ice Lake, of
// the direct product's speed: one level 0.91-0.99 (768-1536 channels), 0.95-1.00 (2048), 1.01-1.11 (3072);
// two levels 0.85-1.02. Zen 4 starts one a cycle, in halves: one level 1.02-1.03 (256-384), 1.05-1.06
// (448-768), 1.08-1.10 (1024-3072). Two levels, 1.01-1.04 of one there (768-1536), are not taken with
// AVX-512 at all: beside oneDNN's, which adds up more exactly then, their errors pass the numerics rule.
//
// Values that are not finite would spread in Strassen's sums to the pixels of the other panels: panels
// that hold one are multiplied directly.
#include "cpu/epilogue.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

using S = Simd<kLanes>;
using Float = S::Float;

constexpr int kRows = kRegisters / 8 * 6 / kVectors;  // M of whole groups
constexpr int kRowStep = kRows / 3;                   // M of the last group is a multiple of this
constexpr int kTile = 512;
constexpr int kPanels = kTile / kPanel;
// Groups that take turns with a panel while it is in L2.
constexpr int kBand = 24 / kRows;
constexpr int64_t kHalf = kWide ? 768 : 512;  // most k of half a chunk
constexpr int64_t kShort = 512;               // of half a short one
constexpr int64_t kQuarter = 384;             // and of a quarter
constexpr int64_t kSum = 64;       // most terms of one sum
// Terms between two looks at whether a sum has ended: few enough looks to be foreseen.
constexpr int kTerms = 8;
// Floats that a term asks for: a cache line, or a panel's row where that is less.
constexpr int64_t kAsked = kPanel < 16 ? kPanel : 16;
// Terms of a panel that the groups of a band take turns with: where its row is four cache lines, half a
// chunk is more than L1 holds.
constexpr int64_t kPiece = kWide ? kSum : kHalf;

// What the operands of a group are, in the order of the products that use them; then what only the
// direct product uses.
enum Operand { kA11A22, kA21A22, kA11, kA22, kA11A12, kA21A11, kA12A22, kA12, kA21, kOperands };
constexpr int kProducts = 7;
// Sums of a pair of panels; the last two are panels as they are, copied where those are sums.
enum PairSum { kB11B22, kB12B22, kB21B11, kB11B12, kB21B22, kB11, kB22, kPairSums };

// A product of the outer level: blocks of A and B, numbered along the rows, to be added, the second
// with a sign (0: there is none), and where in C the result goes.
struct Target {
  int block;
  float sign;  // 0: nowhere
  bool first;  // the first to arrive there
};
struct Outer {
  int a[2];
  float a_sign;
  int b[2];
  float b_sign;
  Target c[2];
};
constexpr Outer kOneLevel[] = {{{0, 0}, 0, {0, 0}, 0, {{0, 1, true}, {0, 0, false}}}};
constexpr Outer kTwoLevels[] = {
    {{0, 3}, 1, {0, 3}, 1, {{0, 1, true}, {3, 1, true}}},
    {{2, 3}, 1, {0, 0}, 0, {{2, 1, true}, {3, -1, false}}},
    {{0, 0}, 0, {1, 3}, -1, {{1, 1, true}, {3, 1, false}}},
    {{3, 0}, 0, {2, 0}, -1, {{0, 1, false}, {2, 1, false}}},
    {{0, 1}, 1, {3, 0}, 0, {{0, -1, false}, {1, 1, false}}},
    {{2, 0}, -1, {0, 1}, 1, {{3, 1, false}, {0, 0, false}}},
    {{1, 3}, -1, {2, 3}, 1, {{0, 1, false}, {0, 0, false}}},
};

// The fewest channels from which on one level is taken by itself. At 256 it is as fast as none (Zen 3), and
// where PyTorch adds up most exactly, with one thread, the largest error of a map may break the numerics
// rule.
int64_t strassen_from() {
  constexpr int64_t kFrom = 384;
#if defined(__AVX512F__)
  // Of AMD's family 19h only Zen 4 has AVX-512.
  return __builtin_cpu_is("amdfam19h") ? kFrom : 3072;
#else
  return kFrom;
#endif
}

// Vectors of a panel that begins at `pixel`, and whether that is all of them. Only panels that have all go
// by Strassen's algorithm: of another no more than those vectors is multiplied.
CMF_INLINE int64_t panel_vectors(int64_t plane, int64_t pixel) {
  return min(kVectors, ceil_div(plane - pixel, kLanes));
}
CMF_INLINE bool whole_panel(int64_t plane, int64_t pixel) {
  return panel_vectors(plane, pixel) == kVectors;
}

// Whether a plane has that many whole panels.
bool has_panels(int64_t count, int64_t plane) { return whole_panel(plane, (count - 1) * kPanel); }

// How many levels of Strassen's algorithm are taken at this size, of those asked for: those that save
// multiply-adds worth their sums.
int strassen_levels(int64_t c_in, int64_t c_out, int64_t plane, int asked) {
  if (asked == kFastestLevels) asked = c_in < strassen_from() ? 0 : 1;
  if (c_in % 2 != 0 || c_in < 256 || c_out < 2 * kRows || !has_panels(2, plane)) return 0;
  const bool one = kWide || c_in % 4 != 0 || c_in < 640 || c_out < 4 * kRows || !has_panels(4, plane);
  return static_cast<int>(min(asked, one ? 1 : 2));
}

int64_t group(int levels) { return levels == 2 ? 4 * kRows : 2 * kRows; }

// The same cut of the input channels for every tile: equal pieces, of 2 * Q halves each where Q is 2.
template <int Q>
int64_t chunk_length(int64_t c_in) {
  return Q == 2 ? even_pieces(c_in, 4 * kQuarter, 4) : even_pieces(c_in, 2 * kHalf, 2);
}

// From one row of operands of at most that many k to the next, in floats: not a power of two, whose lines
// share a few sets of the caches. Rows of 512 that are spread for 768 cost 1 % on Zen 4.
constexpr int64_t row_stride(int64_t most) { return most + 16; }

// Of the results of a group for a tile.
constexpr int64_t kGroupFloats = int64_t{2} * kRows * kTile;

// One tile's memory; sums and products only where Strassen's algorithm is used.
struct Scratch {
  float* operands;  // [group of the band][kOperands][M][row_stride]
  float* results;   // [2 M output channels][panel][2 M][kPanel], of one band where that is enough
  float* products;  // [group of the band][set of a block][kProducts][M][kPanel]
  float* sums;      // [kPairSums][set][kc][kPanel]
  bool* clean;      // [kPanels]: whether a panel may go by Strassen's algorithm

  template <int Q>
  static constexpr int64_t kSets = kPanels / (2 * Q);
  static constexpr int64_t kSums =
      max(kSets<1> * kB11 * kHalf, kSets<2> * kPairSums * kQuarter) * kPanel;
  static constexpr int64_t kFlags = 64;  // floats that hold `clean`
  static_assert(kFlags * sizeof(float) >= kPanels * sizeof(bool));
  static constexpr int64_t kBandOperands = int64_t{kBand} * kOperands * kRows * row_stride(kHalf);
  // Sets whose products are there together. All sets of a tile use a band's operands: packed for 16 pairs
  // in the place of 8, and with results that are finished as they are added up, 768/32 is 1.04x as fast,
  // 1024/20 1.02-1.04x (Zen 3).
  static constexpr int64_t kBlock = min(kSets<1>, 8);
  static constexpr int64_t kBandProducts = kBand * kBlock * kProducts * kRows * kPanel;

  // For any plane: as for a whole tile.
  static int64_t groups(int64_t c_in, int64_t c_out, int asked) {
    const bool all = chunk_length<1>(c_in) < c_in || strassen_levels(c_in, c_out, kTile, asked) == 2;
    return all ? 2 * ceil_div(c_out, 4 * kRows) : kBand;
  }
  static int64_t floats(int64_t c_in, int64_t c_out, int asked) {
    const bool strassen = strassen_levels(c_in, c_out, kTile, asked) > 0;
    return kFlags + kBandOperands + groups(c_in, c_out, asked) * kGroupFloats +
           (strassen ? kBandProducts + kSums : 0);
  }

  Scratch(float* at, int64_t c_in, int64_t c_out, int asked)
      : operands(at + kFlags),
        results(operands + kBandOperands),
        products(results + groups(c_in, c_out, asked) * kGroupFloats),
        sums(products + kBandProducts),
        clean(reinterpret_cast<bool*>(at)) {}
};

// Rows of the weights that a band packs: those of every group and term.
struct WeightRows {
  const float* first[2];  // of either term
  int64_t stride;         // from row to row
  int64_t rows;           // of a group and term
  int64_t group_rows;     // from group to group
  int64_t groups;
  int64_t terms;

  CMF_INLINE int64_t count() const { return terms * groups * rows; }
  CMF_INLINE const float* operator()(int64_t i) const {
    const int64_t group = i / rows % groups, term = i / (rows * groups);
    return first[term] + (group * group_rows + i % rows) * stride;
  }
};

// GCC 12 spills in this loop: with AVX-512 where it is a function of its own (24 of 312 instructions),
// else where it is not. tests/test_counts.py holds the latter.
#if defined(__AVX512F__)
#define CMF_LOOP CMF_INLINE
#else
#define CMF_LOOP __attribute__((noinline))
#endif

// out[m][V of kVectors] = (add: out +) sum_k weight[m][k] * panel[k][V of kVectors]; from one row of weights
// to the next it is kRow floats, or `stride` where that is 0. Asks, with kAsks, for kAsked floats at `next` a
// term, and for 2 * count floats at `ahead`, of rows that are `stride` apart for `count` of each: line by
// line, because a processor that is asked for many at once stops until the first of them are there.
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

// Of the last panel of a plane, the vectors that are there.
template <int M, int V, int64_t kRow>
__attribute__((noinline)) void multiply_part(const float* panel, const float* weight, int64_t count,
                                             const float* next, const float* ahead, bool add,
                                             float* out) {
  multiply_vectors<M, V, kRow, true>(panel, weight, count, next, ahead, add, out);
}

// By rows of weights where PyTorch keeps them, `stride` apart: no copy.
template <int M, int V>
__attribute__((noinline)) void multiply_in_place(const float* panel, const float* weight,
                                                 int64_t stride, int64_t count, const float* ahead,
                                                 bool add, float* out) {
  multiply_vectors<M, V, 0, false>(panel, weight, count, panel, ahead, add, out, stride);
}

// Calls f(Index<V>) with a panel's vectors as a constant.
template <class F>
CMF_INLINE void with_vectors(int64_t vectors, F&& f) {
  static_for<kVectors>([&](auto v) __attribute__((always_inline)) {
    constexpr int V = decltype(v)::value + 1;
    if (vectors == V) f(Index<V>{});
  });
}

// The same for `groups` groups of M rows, which take turns with each piece of the panel. The last of
// them ask for the next piece, after the last piece for that at `next`; on AVX2 only they, because a Zen 3
// core whose other hyperthread is busy was seen to do 1.6 loads a cycle, and a turn without asking has 8
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

// Panels of a tile that go through the weights together: sets of 2 * Q neighbours by Strassen's
// algorithm, single ones directly. They are numbered through all images.
struct Panels {
  int64_t pixel, per_image;  // where in its image the first one lies; how many each image has
  int64_t sets = 0, singles = 0;
  int64_t set[Scratch::kSets<1>];  // the first panel of each
  int64_t single[kPanels];

  // In its image.
  CMF_INLINE int64_t pixel_of(int64_t panel) const { return pixel + panel % per_image * kPanel; }
};

// A chunk of input channels, for one product of the outer level. Where the chunk has an odd channel
// more, the first half has it, and all is direct.
struct Chunk {
  int64_t k0, kc, rest;  // first input channel; channels of the halves of a block
  bool first, last;      // chunk
  Outer outer;
};

// The weights of a group and a chunk as operands; rows past c_out are zeros. Terms: blocks of the outer
// level that are added.
template <int M, int Q, int Terms, int64_t kRow>
CMF_INLINE void pack_operands(const Pointwise& p, const Chunk& t, int64_t first, bool strassen,
                              bool direct, float* to) {
  const int64_t kc = t.kc;
  const float sign = t.outer.a_sign;
  alignas(64) float none[kHalf];
  if (first + Q * 2 * M > p.c_out) {
    for (int64_t k = 0; k < kc; ++k) none[k] = 0.0f;
  }
  for (int64_t m = 0; m < M; ++m) {
    // [term][block of the inner level]
    const float* a[2][4];
    for (int term = 0; term < Terms; ++term) {
      const int row = t.outer.a[term] / Q, column = t.outer.a[term] % Q;
      for (int inner = 0; inner < 4; ++inner) {
        const int64_t channel = first + (2 * row + inner / 2) * M + m;
        const float* from = p.weight + channel * p.c_in + t.k0 + (2 * column + inner % 2) * kc;
        a[term][inner] = channel < p.c_out ? from : none;
      }
    }
    float* row = to + m * kRow;
    auto at = [&](Operand which) { return row + which * (M * kRow); };
    if (Terms == 1) {
      copy(a[0][0], at(kA11), kc);
      copy(a[0][3], at(kA22), t.rest);
    }
    if (direct) {
      copy(a[0][1], at(kA12), t.rest);
      copy(a[0][2], at(kA21), kc);
    }
    if (!strassen) continue;
    auto sums = [&](int64_t k, auto load, auto store) __attribute__((always_inline)) {
      auto block = [&](int inner) __attribute__((always_inline)) {
        auto w = load(a[0][inner] + k);
        if (Terms == 2) w = w + sign * load(a[1][inner] + k);
        return w;
      };
      const auto w11 = block(0), w12 = block(1), w21 = block(2), w22 = block(3);
      if (Terms == 2) {
        store(at(kA11) + k, w11);
        store(at(kA22) + k, w22);
      }
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

// Where a pair of panels has its blocks, for a chunk.
struct Pair {
  const float *b11, *b12, *b21, *b22;
};
CMF_INLINE Pair pair_at(const float* panel, int64_t stride, int64_t kc) {
  return {panel, panel + stride, panel + kc * kPanel, panel + stride + kc * kPanel};
}

// The pair that is block `block` of the outer level of a set of 2 * Q panels.
template <int Q>
CMF_INLINE Pair outer_pair(const Pointwise& p, const Chunk& t, int64_t set, int block) {
  const int64_t row = block / Q, column = block % Q;
  return pair_at(p.panels + (set + 2 * column) * p.panel_stride + (t.k0 + 2 * row * t.kc) * kPanel,
                 p.panel_stride, t.kc);
}

// The sums of a pair, or of b + sign * c, to `to`, and from one kind of sum to the next `step` floats
// further.
template <int Terms>
CMF_INLINE void pair_sums(const Pair& b, const Pair& c, float sign, int64_t kc, int64_t step,
                          float* to) {
  const int64_t count = kc * kPanel;
  for (int64_t i = 0; i < count; i += kLanes) {
    auto block = [&](const float* one, const float* two) __attribute__((always_inline)) {
      Float v = S::load(one + i);
      if (Terms == 2) v = v + sign * S::load(two + i);
      return v;
    };
    const Float b11 = block(b.b11, c.b11), b12 = block(b.b12, c.b12);
    const Float b21 = block(b.b21, c.b21), b22 = block(b.b22, c.b22);
    S::store(to + kB11B22 * step + i, b11 + b22);
    S::store(to + kB12B22 * step + i, b12 - b22);
    S::store(to + kB21B11 * step + i, b21 - b11);
    S::store(to + kB11B12 * step + i, b11 + b12);
    S::store(to + kB21B22 * step + i, b21 + b22);
    if (Terms == 2) {
      S::store(to + kB11 * step + i, b11);
      S::store(to + kB22 * step + i, b22);
    }
  }
}

// Two panels' results, [2 M][kPanel] each, that the products of a pair are added to.
struct Place {
  float *left, *right;
  float sign;
  bool store;  // in the place of what is there
};

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

template <int M>
CMF_INLINE void combine(const float* products, const Place* places, int count) {
  constexpr int kSize = M * kPanel;
  for (int i = 0; i < kSize; i += kLanes) {
    const auto [c11, c12, c21, c22] = product_sums(products + i, kSize);
    for (int n = 0; n < count; ++n) {
      float* left = places[n].left + i;
      float* right = places[n].right + i;
      if (places[n].store) {
        S::store(left, c11);
        S::store(right, c12);
        S::store(left + kSize, c21);
        S::store(right + kSize, c22);
      } else {
        const float sign = places[n].sign;
        S::store(left, sign * c11 + S::load(left));
        S::store(right, sign * c12 + S::load(right));
        S::store(left + kSize, sign * c21 + S::load(left + kSize));
        S::store(right + kSize, sign * c22 + S::load(right + kSize));
      }
    }
  }
}

// Per output channel of a group; zeros past c_out.
struct Vectors {
  float bias[2 * kRows], scale[2 * kRows], shift[2 * kRows];
};

// scale * act(result + bias) + shift of `rows` rows of one panel's first V vectors, into z.
template <int V>
__attribute__((noinline)) void finish_panel(const Pointwise& p, const Vectors& v, int64_t first,
                                            int64_t rows, int64_t image, int64_t pixel,
                                            const float* result) {
  const int64_t pixels = min(kPanel, p.plane - pixel);
  with_activation(p.act, [&](auto act) __attribute__((always_inline)) {
    constexpr Activation A = static_cast<Activation>(decltype(act)::value);
    // kGroup vectors in step, or what 4 rows have. Rows past the last one are there, but not stored.
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
// and of `results`, [2][2 * half][kPanel], where they are there.
__attribute__((noinline)) void finish_pair(const Pointwise& p, const Vectors& v, int64_t first,
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

// The results of a band's groups for the sets of panels that one target of the outer level covers.
template <int M, int Q>
struct Results {
  static constexpr int64_t kPanelFloats = int64_t{2} * M * kPanel;
  float* first;  // of the band
  const Panels& panels;

  CMF_INLINE float* at(int64_t group, int block, int64_t set) const {
    return first + (group * Q + block / Q) * kGroupFloats +
           (panels.set[set] + 2 * (block % Q)) * kPanelFloats;
  }
};

// The most single panels of a tile for which weights are read where they are. A copy of a band's weights
// waits for memory: with more panels, their products ask for all of the next band's rows in time.
constexpr int64_t kInPlacePanels = 2;

// The single panels of a tile by `count` groups of whole rows from channel `first` on, for one chunk, with
// no copy of the weights. Every piece of kSum terms is multiplied by all groups before the next, and each
// asks for the weights of its successor: at the end of the rows those of the next band, where there is one.
// The sums have the pieces of multiply_groups, and so the same bits.
void band_in_place(const Pointwise& p, const Chunk& t, const Panels& panels, int64_t first,
                   int64_t count, bool more, float* band_results) {
  constexpr int64_t kResult = int64_t{2} * kRows * kPanel;
  const int64_t length = t.kc + t.rest, blocks = 2 * count;
  for (int64_t i = 0; i < panels.singles; ++i) {
    const float* panel = p.panels + panels.single[i] * p.panel_stride + t.k0 * kPanel;
    with_vectors(panel_vectors(p.plane, panels.pixel_of(panels.single[i])), [&](auto v) {
      for (int64_t k = 0, end = t.kc; k < length; end = k < t.kc ? t.kc : length) {
        const int64_t terms = min(kSum, end - k), then = k + terms;
        for (int64_t g = 0; g < blocks; ++g) {
          const float* weight = p.weight + (first + g * kRows) * p.c_in + t.k0;
          const float* next_band = more ? weight + blocks * kRows * p.c_in : weight;
          multiply_in_place<kRows, decltype(v)::value>(
              panel + k * kPanel, weight + k, p.c_in, terms,
              then < length ? weight + then : next_band, !t.first || k > 0,
              band_results + g / 2 * kGroupFloats + panels.single[i] * kResult +
                  g % 2 * (kRows * kPanel));
        }
        k = then;
      }
    });
  }
}

// `count` groups of output channels from `first` on, for one chunk and one product of the outer level.
template <int M, int Q, int64_t kRow>
__attribute__((noinline)) void band(const Pointwise& p, const Chunk& t, const Panels& panels,
                                    int64_t first, int64_t count, int64_t end,
                                    const Scratch& scratch, float* band_results,
                                    const WeightRows& next_weights) {
  constexpr int64_t kOperand = M * kRow, kResult = int64_t{2} * M * kPanel;
  constexpr int64_t kProduct = M * kPanel;
  constexpr int64_t kGroupProducts = Scratch::kBlock * kProducts * kProduct;
  constexpr int64_t kGroupRows = int64_t{2} * M * Q;
  const bool strassen = panels.sets > 0, direct = panels.singles > 0;
  const bool in_place = Q == 1 && M == kRows && !strassen && panels.singles <= kInPlacePanels &&
                        first + count * kGroupRows <= p.c_out;
  for (int64_t g = 0; g < count && !in_place; ++g) {
    float* operands = scratch.operands + g * (kOperands * kOperand);
    if (t.outer.a_sign == 0.0f) {
      pack_operands<M, Q, 1, kRow>(p, t, first + g * kGroupRows, strassen, direct, operands);
    } else {
      pack_operands<M, Q, 2, kRow>(p, t, first + g * kGroupRows, strassen, direct, operands);
    }
  }
  const Results<M, Q> results = {band_results, panels};
  const int targets = t.outer.c[1].sign == 0.0f ? 1 : 2;
  auto stored = [&](const Target& c) { return t.first && c.first; };

  // What comes from L3 or memory is asked for while this band multiplies: the sums that are there
  // already, for the end of this function, and the next band's weights.
  const int64_t group_sets = panels.sets * count;
  const int64_t sums_ahead[2] = {stored(t.outer.c[0]) ? 0 : group_sets,
                                 targets == 1 || stored(t.outer.c[1]) ? 0 : group_sets};
  int64_t asked = 0;
  auto ahead = [&](const float* nothing) {
    int64_t i = asked++;
    for (int n = 0; n < 2; i -= sums_ahead[n++]) {
      if (i < sums_ahead[n]) {
        return static_cast<const float*>(
            results.at(i / panels.sets, t.outer.c[n].block, i % panels.sets));
      }
    }
    return i < next_weights.count() ? next_weights(i) : nothing;
  };

  Vectors group_vectors[kBand * Q] = {};
  if (t.last) {
    for (int64_t g = 0; g < count * Q; ++g) {
      const int64_t channel = first + g * (2 * M), rows = min(2 * M, end - channel);
      for (int64_t m = 0; m < rows; ++m) {
        group_vectors[g].bias[m] = p.bias != nullptr ? p.bias[channel + m] : 0.0f;
        group_vectors[g].scale[m] = p.scale[channel + m];
        group_vectors[g].shift[m] = p.shift[channel + m];
      }
    }
  }

  if (strassen) {
    const int64_t sum = t.kc * kPanel, kind = Scratch::kSets<Q> * sum;
    // The right-hand factor of a product for a set.
    auto factor = [&](int product, int64_t i) {
      const float* sums = scratch.sums + i * sum;
      const bool sums_only = t.outer.b_sign != 0.0f;
      const Pair b = outer_pair<Q>(p, t, panels.set[i], t.outer.b[0]);
      const float* const all[kProducts] = {sums + kB11B22 * kind,
                                           sums_only ? sums + kB11 * kind : b.b11,
                                           sums + kB12B22 * kind,
                                           sums + kB21B11 * kind,
                                           sums_only ? sums + kB22 * kind : b.b22,
                                           sums + kB11B12 * kind,
                                           sums + kB21B22 * kind};
      // In the order of the products: P1 takes B11, P4 takes B22.
      return all[product];
    };
    for (int64_t begin = 0; begin < panels.sets; begin += Scratch::kBlock) {
      const int64_t end_set = min(begin + Scratch::kBlock, panels.sets);
      const float* b = factor(0, begin);
      for (int product = 0; product < kProducts; ++product) {
        for (int64_t i = begin; i < end_set; ++i) {
          const float* next = i + 1 < end_set           ? factor(product, i + 1)
                              : product + 1 < kProducts ? factor(product + 1, begin)
                                                        : factor(0, end_set < panels.sets ? end_set : 0);
          const float* asked_for[kBand];
          for (int64_t g = 0; g < count; ++g) asked_for[g] = ahead(b);
          multiply_groups<M, kVectors, kRow>(
              b, t.kc, next, count,
              [&](int64_t g) { return scratch.operands + (g * kOperands + product) * kOperand; },
              [&](int64_t g) { return asked_for[g]; }, false,
              [&](int64_t g) {
                return scratch.products + g * kGroupProducts +
                       ((i - begin) * kProducts + product) * kProduct;
              });
          b = next;
        }
      }
      for (int64_t g = 0; g < count; ++g) {
        for (int64_t i = begin; i < end_set; ++i) {
          const float* products =
              scratch.products + g * kGroupProducts + (i - begin) * (kProducts * kProduct);
          if (Q == 1 && t.last) {
            const int64_t pair = panels.set[i], channel = first + g * (2 * M);
            finish_pair(p, group_vectors[g], channel, min(2 * M, end - channel), M,
                        pair / panels.per_image, panels.pixel_of(pair), products,
                        t.first ? nullptr : results.at(g, 0, i));
            continue;
          }
          Place places[2];
          for (int n = 0; n < targets; ++n) {
            const Target& c = t.outer.c[n];
            float* left = results.at(g, c.block, i);
            places[n] = {left, left + kResult, c.sign, stored(c)};
          }
          combine<M>(products, places, targets);
        }
      }
    }
  }
  if constexpr (Q == 1) {
    if (in_place) {
      band_in_place(p, t, panels, first, count, next_weights.groups > 0, band_results);
    }
    for (int64_t i = 0; i < panels.singles && !in_place; ++i) {
      auto panel = [&](int64_t n) {
        return p.panels + panels.single[n] * p.panel_stride + t.k0 * kPanel;
      };
      const int64_t vectors = panel_vectors(p.plane, panels.pixel_of(panels.single[i]));
      const float* b1 = panel(i);
      const float* b2 = b1 + t.kc * kPanel;
      const float* next = i + 1 < panels.singles ? panel(i + 1) : b1;
      auto half = [&](const float* b, Operand top, Operand bottom, int64_t kc, const float* then,
                      bool add) {
        const float* asked_for[2 * kBand];
        for (int64_t g = 0; g < 2 * count; ++g) asked_for[g] = ahead(b);
        with_vectors(vectors, [&](auto v) __attribute__((always_inline)) {
          multiply_groups<M, decltype(v)::value, kRow>(
              b, kc, then, 2 * count,
              [&](int64_t g) {
                return scratch.operands +
                       (g / 2 * kOperands + (g % 2 == 0 ? top : bottom)) * kOperand;
              },
              [&](int64_t g) { return asked_for[g]; }, add,
              [&](int64_t g) {
                return band_results + g / 2 * kGroupFloats + panels.single[i] * kResult +
                       g % 2 * kProduct;
              });
        });
      };
      half(b1, kA11, kA21, t.kc, b2, !t.first);
      half(b2, kA12, kA22, t.rest, next, true);
    }
  }
  if (!t.last) return;

  for (int64_t g = 0; g < count * Q; ++g) {
    const int64_t channel = first + g * (2 * M), rows = min(2 * M, end - channel);
    if (rows <= 0) break;
    auto finish = [&](int64_t panel) {
      const int64_t pixel = panels.pixel_of(panel);
      with_vectors(panel_vectors(p.plane, pixel), [&](auto v) {
        finish_panel<decltype(v)::value>(p, group_vectors[g], channel, rows,
                                         panel / panels.per_image, pixel,
                                         band_results + g * kGroupFloats + panel * kResult);
      });
    };
    if constexpr (Q == 2) {
      for (int64_t i = 0; i < panels.sets; ++i) {
        for (int64_t n = 0; n < 2 * Q; ++n) finish(panels.set[i] + n);
      }
    }
    for (int64_t i = 0; i < panels.singles; ++i) finish(panels.single[i]);
  }
}

// Whether the sums of a tile's panels are still there after its last product.
bool keeps_sums(int64_t c_in, int64_t c_out, int64_t plane, int asked) {
  const int levels = strassen_levels(c_in, c_out, plane, asked);
  return levels == 0 || (levels == 1 && chunk_length<1>(c_in) == c_in);
}

// Output channels [begin, end) of some panels of a tile, whose sums are to be made or `made` already.
template <int Q, int64_t kRow>
void product(const Pointwise& p, const Panels& panels, int64_t begin, int64_t end, bool made,
             const Scratch& scratch) {
  constexpr int64_t kGroupRows = int64_t{2} * kRows * Q;
  const int64_t length = chunk_length<Q>(p.c_in);
  const Outer* const outers = Q == 2 ? kTwoLevels : kOneLevel;
  constexpr int kOuters = Q == 2 ? 7 : 1;
  // Whole groups in bands; a last group that is not whole is a band by itself.
  auto band_groups = [](int64_t first, int64_t last) {
    return min(kBand, max((last - first) / kGroupRows, 1));
  };
  for (int64_t k0 = 0; k0 < p.c_in; k0 += length) {
    Chunk t;
    const int64_t block = min(length, p.c_in - k0) / Q;
    t.k0 = k0;
    t.rest = block / 2;
    t.kc = block - t.rest;
    t.first = k0 == 0;
    auto weight_rows = [&](const Chunk& chunk, int64_t first) {
      WeightRows rows;
      rows.terms = chunk.outer.a_sign == 0.0f ? 1 : 2;
      for (int n = 0; n < rows.terms; ++n) {
        const int row = chunk.outer.a[n] / Q, column = chunk.outer.a[n] % Q;
        rows.first[n] = p.weight + (first + 2 * kRows * row) * p.c_in + k0 + 2 * column * t.kc;
      }
      rows.stride = p.c_in;
      rows.rows = 2 * kRows;
      rows.group_rows = kGroupRows;
      // After the end it is the next piece's. The last group is not asked for: it may be smaller than its
      // rows say.
      const int64_t last = first >= end && chunk.last ? p.c_out : end;
      rows.groups = first + kGroupRows <= last ? band_groups(first, last) : 0;
      return rows;
    };
    for (int o = 0; o < kOuters; ++o) {
      t.outer = outers[o];
      t.last = k0 + length >= p.c_in && o + 1 == kOuters;
      const int64_t kind = Scratch::kSets<Q> * t.kc * kPanel;
      for (int64_t i = 0; !made && i < panels.sets; ++i) {
        const Pair b = outer_pair<Q>(p, t, panels.set[i], t.outer.b[0]);
        const Pair c = outer_pair<Q>(p, t, panels.set[i], t.outer.b[1]);
        float* to = scratch.sums + i * t.kc * kPanel;
        if (t.outer.b_sign == 0.0f) {
          pair_sums<1>(b, c, 0.0f, t.kc, kind, to);
        } else {
          pair_sums<2>(b, c, t.outer.b_sign, t.kc, kind, to);
        }
      }
      for (int64_t first = begin; first < end;) {
        const int64_t count = band_groups(first, end), rows = min(kGroupRows, end - first);
        float* results = scratch.results;
        if (kOuters > 1 || length < p.c_in) {
          results += (first - begin) / (2 * kRows) * kGroupFloats;
        }
        const int64_t next = first + count * kGroupRows;
        Chunk then = t;
        if (next >= end && o + 1 < kOuters) then.outer = outers[o + 1];
        const WeightRows ahead = weight_rows(then, next >= end && o + 1 < kOuters ? begin : next);
        auto run = [&](auto m) {
          band<decltype(m)::value, Q, kRow>(p, t, panels, first, count, end, scratch, results, ahead);
        };
        switch (ceil_div(rows, 2 * Q * kRowStep)) {
          case 3: run(Index<kRows>{}); break;
          case 2: run(Index<2 * kRowStep>{}); break;
          default: run(Index<kRowStep>{}); break;
        }
        first = next;
      }
    }
  }
}

// Whether all values of a panel are finite.
bool finite(const float* panel, int64_t c_in) {
  Float sums[4] = {};
  int64_t i = 0;
  const int64_t count = c_in * kPanel;
  // 0 * NaN and 0 * infinity are NaN, and stay it.
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

void run(const Pointwise& p, int64_t pixel_begin, int64_t pixel_end, int64_t group_begin,
         int64_t group_end, float* memory) {
  const Scratch scratch(memory, p.c_in, p.c_out, p.strassen_levels);
  const int64_t count = ceil_div(pixel_end - pixel_begin, kPanel), all = p.images * count;
  const int levels = strassen_levels(p.c_in, p.c_out, p.whole_plane, p.strassen_levels);
  const int64_t begin = group_begin * group(levels), end = min(group_end * group(levels), p.c_out);
  bool* const clean = scratch.clean;
  bool done[kPanels] = {};
  for (int64_t i = 0; !p.again && i < all; ++i) {
    clean[i] = levels > 0 && whole_panel(p.plane, pixel_begin + i % count * kPanel) &&
               finite(p.panels + i * p.panel_stride, p.c_in);
  }
  const bool made = p.again && keeps_sums(p.c_in, p.c_out, p.whole_plane, p.strassen_levels);
  // An image's panels go the same way whatever else is in the tile. Calls take(i) for sets of `size`
  // neighbours, of those that a set of that size can begin with, that are clean and not done.
  auto for_sets = [&](int64_t size, auto take) {
    for (int64_t first = 0; first < all; first += count) {
      for (int64_t i = first; i + size <= first + count; i += size) {
        bool good = true;
        for (int64_t n = i; n < i + size; ++n) good = good && clean[n] && !done[n];
        if (!good) continue;
        for (int64_t n = i; n < i + size; ++n) done[n] = true;
        take(i);
      }
    }
  };
  Panels panels;
  panels.pixel = pixel_begin;
  panels.per_image = count;
  auto multiply_them = [&](auto q) {
    if (panels.sets + panels.singles == 0) return;
    constexpr int Q = decltype(q)::value;
    constexpr int64_t kMost = Q == 2 ? kQuarter : kHalf;
    if (Q == 1 && kShort < kHalf && chunk_length<1>(p.c_in) <= 2 * kShort) {
      product<1, row_stride(kShort)>(p, panels, begin, end, made, scratch);
    } else {
      product<Q, row_stride(kMost)>(p, panels, begin, end, made, scratch);
    }
    panels.sets = panels.singles = 0;
  };
  if (levels == 2) {
    for_sets(4, [&](int64_t i) { panels.set[panels.sets++] = i; });
    multiply_them(Index<2>{});
  }
  if (levels > 0) {
    for_sets(2, [&](int64_t i) {
      panels.set[panels.sets++] = i;
    });
  }
  for (int64_t i = 0; i < all; ++i) {
    if (done[i]) continue;
    panels.single[panels.singles++] = i;
  }
  multiply_them(Index<1>{});
}

}  // namespace

extern const PointwiseKernels pointwise_kernels;
const PointwiseKernels pointwise_kernels = {kPanel, kTile,      group,           kBand,
                                            strassen_levels, keeps_sums, Scratch::floats, run};

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
