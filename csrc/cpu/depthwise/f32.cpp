// The float32 depthwise kernels of one instruction set. Compiled once for each (simd.h).
//
// blocking_f32.h: blocks and their zero-padded scratch; planar_f32.h and channels_last_f32.h: the loop nest of
// each layout with its register count.
#include "cpu/depthwise/blocking_f32.h"
#include "cpu/depthwise/channels_last_f32.h"
#include "cpu/depthwise/depthwise.h"
#include "cpu/depthwise/planar_f32.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

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
