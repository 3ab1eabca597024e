// The fused depthwise half of a ConvMixer block, float32, inference:
//
//   y[n,c,h,w] = x[n,c,h,w] + scale[c] * act(bias[c] + sum_{i,j} weight[c,i,j] *
//                                             x[n, c, h + i - (k-1)/2, w + j - (k-1)/2]) + shift[c]
//
// with zeros outside the image: (k-1)/2 before and k/2 after each axis ("same", odd or even k).
// scale and shift are BatchNorm's in eval mode: gamma / sqrt(var + eps) and beta - mean * scale.
//
// Each output value is bias, then the taps in row-major order, one multiply-add each (for k other
// than 3, 5, 7 and 9 each kernel row in a sum of its own), then the epilogue: neither the thread
// count, nor the batch, nor the strides change a bit of it.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "cpu/layout.h"

namespace convmixer_fast {

// Planar problems have w stride 1 and weights [c][k*k]; channels-last ones c stride 1 and weights
// [k*k][c].
//
// Strides are in floats, in the order n, c, h, w; they may be 0 or overlap for x, not for y.
// y must not overlap x.
struct DepthwiseMix {
  const float* x;
  int64_t x_stride[4];
  float* y;
  int64_t y_stride[4];
  int64_t n, c, h, w;
  int64_t k;
  const float* weight;
  const float* bias;  // null: no bias
  const float* scale;
  const float* shift;
  Activation act;
  // Planar only: that many rows and columns around x are the image's own and lie in memory where x's strides
  // put them; beyond them are zeros.
  int64_t above = 0, below = 0, left = 0, right = 0;
};

// The blocks of a DepthwiseMix: every one is `rows` x `cols` output pixels of `channels` channels
// of one image, copied with its halo into a zero-padded scratch and computed from there.
struct DepthwiseBlocks {
  int64_t channels, rows, cols;
  int64_t scratch_floats;
  int64_t count;
};

// One instruction set's kernels; they neither allocate nor throw.
struct DepthwiseKernels {
  DepthwiseBlocks (*blocks)(const DepthwiseMix&, Layout);

  // Blocks begin .. end-1 with a scratch of `scratch_floats` floats, 64-byte aligned.
  void (*run)(const DepthwiseMix&, Layout, const DepthwiseBlocks&, int64_t begin, int64_t end,
              float* scratch);

  // Channels begin .. end-1 of one planar image into packed panels (panel_gemm.h), zeros after the
  // last pixel; y is not used. `sums` has room for a plane and one vector; where x's rows have gaps, for
  // two planes. `shared`: other cores read the panels next.
  void (*run_panels)(const DepthwiseMix&, const DepthwiseBlocks&, int64_t begin, int64_t end,
                     float* scratch, float* sums, float* panels, int64_t panel_stride, bool shared);
};

// Computes the whole of it on at most `threads` threads.
// Throws std::bad_alloc when there is no memory for the scratch; y is then unspecified.
void depthwise_mix(const DepthwiseMix& problem, Layout layout, int threads);

}  // namespace convmixer_fast
