// The epilogue of a block's 1x1 convolution as a pass of its own, float32, inference, in place:
//
//   h[n,c,p] = scale[c] * act(h[n,c,p]) + shift[c]
//
// one pass over memory instead of the three or four of separate operators.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "cpu/layout.h"

namespace convmixer_fast {

// h is dense: [n][c][pixels] when planar, [n][pixels][c] when channels-last.
struct Epilogue {
  float* h;
  int64_t n, c, pixels;
  const float* scale;
  const float* shift;
  Activation act;
};

// The kernels of one instruction set: the work is cut into `pieces`, of which `run` does begin .. end-1.
struct EpilogueKernels {
  int64_t (*pieces)(const Epilogue&, Layout);
  void (*run)(const Epilogue&, Layout, int64_t begin, int64_t end);
};

// Computes the whole of it on at most `threads` threads.
void apply_epilogue(const Epilogue& problem, Layout layout, int threads);

}  // namespace convmixer_fast
