// Blocks of the depthwise kernels, float32: block sizes, the zero-padded scratch, the copies into it.
//
// Both layouts have the same shape. A block of output pixels is copied with its halo of k - 1 rows and columns
// into a zero-padded scratch; from there every tile is computed alike, with no test for the image's border and
// no mask; only the store depends on where the block ends. The copy moves about one value for each value
// computed, against k * k multiply-adds; where a block is a whole plane, the zeros around it are written once
// for all channels.
#pragma once

#include "cpu/depthwise/depthwise.h"
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

}  // namespace
}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
