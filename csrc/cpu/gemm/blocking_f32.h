// The float32 GEMM's cache blocking: tile, band and chunk sizes, the choice of algorithm, the scratch.
//
// Where the data are, AVX2, c_in = 1024, one level of Strassen's algorithm: the sums of a tile's panels are
// 5 kinds * 16 pairs * 512 k * 16 floats, 2.6 MB, in L3. Read for every group alone they would be 64 bytes a
// k and 12 multiply-adds of 8 lanes, 13 GB/s of L3 a core at 20 GMAC/s, which other programs may not leave;
// a band reads them once for 4 groups and prefetches the next panel (32 KB) while its last group multiplies.
// A band's operands (344 KB) and products (86 KB) stay in L2. The weights come from memory once a tile,
// 4 bytes against kTile multiply-adds, 0.16 GB/s at 20 GMAC/s, and are prefetched a band ahead.
//
// AVX-512 multiplies directly below 3072 channels where it starts two whole vectors a cycle: multiply-adds
// are so fast there that Strassen's sums, 2.5 times a panel's bytes, do not arrive in time. On Ice Lake, of
// the direct speed: 0.91-0.99 (768-1536 channels), 0.95-1.00 (2048), 1.01-1.11 (3072). Zen 4 starts one a
// cycle, in halves: 1.02-1.03 (256-384), 1.05-1.06 (448-768), 1.08-1.10 (1024-3072).
#pragma once

#include "cpu/gemm/microkernel_f32.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/gemm/strassen.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

constexpr int kTile = 512;
constexpr int kPanels = kTile / kPanel;
constexpr int kPairs = kPanels / 2;
// Output channels of a group: two rows of blocks of M.
constexpr int kGroupRows = 2 * kRows;
// Groups that take turns with a panel while it is in L2.
constexpr int kBand = 24 / kRows;
constexpr int64_t kHalf = kWide ? 768 : 512;  // most k of half a chunk
constexpr int64_t kShort = 512;               // of half a short one
static_assert(kWide || kPiece == kHalf);

// The fewest channels from which on Strassen's algorithm is the default. At 256 it is as fast as direct
// (Zen 3), and where PyTorch's sums are most exact, with one thread, the largest error of a map may break
// the numerics rule.
int64_t strassen_from() {
  constexpr int64_t kFrom = 384;
#if defined(__AVX512F__)
  // Of AMD's family 19h only Zen 4 has AVX-512.
  return __builtin_cpu_is("amdfam19h") ? kFrom : 3072;
#else
  return kFrom;
#endif
}

// Vectors of a panel that begins at `pixel`, and whether they are all of its vectors. Only whole panels go
// by Strassen's algorithm: of a partial one only the vectors that hold pixels are multiplied.
CMF_INLINE int64_t panel_vectors(int64_t plane, int64_t pixel) {
  return min(kVectors, ceil_div(plane - pixel, kLanes));
}
CMF_INLINE bool whole_panel(int64_t plane, int64_t pixel) {
  return panel_vectors(plane, pixel) == kVectors;
}

bool uses_strassen(int64_t c_in, int64_t c_out, int64_t plane, int asked_levels) {
  if (asked_levels == kFastestLevels) asked_levels = c_in < strassen_from() ? 0 : 1;
  const bool fits = c_in % 2 == 0 && c_in >= 256 && c_out >= kGroupRows && whole_panel(plane, kPanel);
  return asked_levels > 0 && fits;
}

// The same cut of the input channels for every tile: equal pieces of two halves.
int64_t chunk_length(int64_t c_in) { return even_pieces(c_in, 2 * kHalf, 2); }

// Whether the sums of a tile's panels are still there after the last chunk.
bool keeps_sums(int64_t c_in, int64_t c_out, int64_t plane, int asked_levels) {
  return !uses_strassen(c_in, c_out, plane, asked_levels) || chunk_length(c_in) == c_in;
}

// From one row of operands of at most that many k to the next, in floats: not a power of two, whose lines
// share a few sets of the caches. Rows of 512 that are spread for 768 cost 1 % on Zen 4.
constexpr int64_t row_stride(int64_t most) { return most + 16; }

// Of the results of a group for a tile.
constexpr int64_t kGroupFloats = int64_t{kGroupRows} * kTile;

// One tile's memory; sums and products only where Strassen's algorithm is used.
struct Scratch {
  float* operands;  // [group of the band][kOperands][M][row_stride]
  float* results;   // [2 M output channels][panel][2 M][kPanel], of one band where that is enough
  float* products;  // [group of the band][pair of a block][kProducts][M][kPanel]
  float* sums;      // [kPairSums][pair][kc][kPanel]
  bool* clean;      // [kPanels]: whether a panel may go by Strassen's algorithm

  static constexpr int64_t kSums = int64_t{kPairs} * kPairSums * kHalf * kPanel;
  static constexpr int64_t kFlags = 64;  // floats that hold `clean`
  static_assert(kFlags * sizeof(float) >= kPanels * sizeof(bool));
  static constexpr int64_t kBandOperands = int64_t{kBand} * kOperands * kRows * row_stride(kHalf);
  // Pairs whose products are there together. All pairs of a tile use a band's operands: packed for 16 pairs
  // instead of 8, and with the epilogue applied as they are added up, 768/32 is 1.04x as fast, 1024/20
  // 1.02-1.04x (Zen 3).
  static constexpr int64_t kBlock = min(kPairs, 8);
  static constexpr int64_t kBandProducts = kBand * kBlock * kProducts * kRows * kPanel;

  // Groups whose results are there together: all where they are added to by several chunks.
  static int64_t groups(int64_t c_in, int64_t c_out) {
    return chunk_length(c_in) < c_in ? ceil_div(c_out, kGroupRows) : kBand;
  }
  // For any plane: as for a whole tile.
  static int64_t floats(int64_t c_in, int64_t c_out, int asked_levels) {
    const bool strassen = uses_strassen(c_in, c_out, kTile, asked_levels);
    return kFlags + kBandOperands + groups(c_in, c_out) * kGroupFloats +
           (strassen ? kBandProducts + kSums : 0);
  }

  Scratch(float* at, int64_t c_in, int64_t c_out)
      : operands(at + kFlags),
        results(operands + kBandOperands),
        products(results + groups(c_in, c_out) * kGroupFloats),
        sums(products + kBandProducts),
        clean(reinterpret_cast<bool*>(at)) {}
};

// Panels of a tile that are multiplied with the weights together: pairs of neighbours by Strassen's
// algorithm, single ones directly. They are numbered through all images.
struct Panels {
  int64_t pixel, per_image;  // where in its image the first one lies; how many each image has
  int64_t pairs = 0, singles = 0;
  int64_t pair[kPairs];  // the first panel of each
  int64_t single[kPanels];

  // In its image.
  CMF_INLINE int64_t pixel_of(int64_t panel) const { return pixel + panel % per_image * kPanel; }
};

// A chunk of input channels. Where it has an odd number, the first half has one more, and all panels are
// multiplied directly.
struct Chunk {
  int64_t k0, kc, rest;  // first input channel; channels of the first and of the second half
  bool first, last;
};

}  // namespace
}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
