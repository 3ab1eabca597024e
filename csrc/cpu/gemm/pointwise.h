// Pointwise convolution of maps in memory with its epilogue, float32, inference: a 1x1 convolution alone, or
// the stem, whose p x p patches are the input channels of one:
//
//   z[n,co,i,j] = scale[co] * act(bias[co] + sum_{c,dy,dx} weight[co,c,dy,dx] *
//                                            x[n, c, p*i + dy, p*j + dx]) + shift[co]
//
// i < h / p, j < w / p: rows and columns beyond whole patches are ignored. Each tile of pixels is packed into
// panels (panel_gemm.h) in L2 and multiplied from there; neither the thread count nor the batch changes a
// bit of z.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace convmixer_fast {

struct Pointwise {
  const float* x;
  int64_t x_stride[4];  // in floats, in the order n, c, h, w; any
  float* z;             // contiguous (n, c_out, h / patch, w / patch); must not overlap x
  int64_t n, c, h, w;
  int64_t patch;        // p; 1 for a pointwise convolution
  int64_t c_out;
  const float* weight;  // contiguous (c_out, c, p, p)
  const float* bias;    // null: none
  const float* scale;
  const float* shift;
  Activation act;
  int strassen_levels;  // of Strassen's algorithm (panel_gemm.h)
};

// On at most `threads` threads. Throws std::bad_alloc when there is no memory for the panels of a
// tile for each thread; z is then unspecified.
void pointwise(const Pointwise& problem, int threads);

}  // namespace convmixer_fast
