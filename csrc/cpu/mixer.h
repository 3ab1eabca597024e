// A stack of ConvMixer blocks in one call, float32, inference, planar (NCHW) maps:
//
//   y = x + scale1 * act(depthwise(x) + bias1) + shift1        (depthwise.h)
//   z = scale2 * act(W y + bias2) + shift2                     (pointwise.h)
//
// y exists only as packed panels: the depthwise kernel's plane of one channel, in L1 or L2, is laid
// straight into them, and the pointwise kernel reads nothing else. x and z are the only maps in
// memory; from the second block on z overwrites x.
//
// Threads: while there are as many images left as threads, each thread takes whole images through
// the whole stack by itself, with no barrier. The rest is shared: planes, then tiles of pixels, with a
// barrier after each half. Every value is computed alike either way.
#pragma once

#include <cstdint>

#include "../activation_id.h"

namespace convmixer_fast {

// One block's parameters but for the pointwise weights, in one piece of memory (mixer_packed_floats
// long) written by mixer_pack: taps [c][k*k], bias1, scale1, shift1, bias2, scale2, shift2 [c].
int64_t mixer_packed_floats(int64_t c, int64_t k);

struct MixerBlock {
  const float* taps;
  const float* bias1;
  const float* scale1;
  const float* shift1;
  const float* bias2;
  const float* scale2;
  const float* shift2;
};
void mixer_pack(const MixerBlock& block, int64_t c, int64_t k, float* packed);

struct MixerStack {
  const float* x;  // contiguous (n, c, h, w)
  float* z;        // likewise; x itself, or no part of it
  int64_t n, c, h, w;
  int64_t k;
  const float* const* blocks;   // `depth` packed blocks
  const float* const* weights;  // and their pointwise weights, [c][c]
  int64_t depth;
  Activation act;
  int strassen_levels;  // of Strassen's algorithm at most (pointwise.h)
};

// How many images of that size a thread takes together.
int64_t mixer_images(int64_t h, int64_t w);

// Images [begin, end) on at most `threads` threads; callers cut a large batch to stay
// interruptible, best into multiples of threads * mixer_images. Throws std::bad_alloc when there is
// no memory for the panels: the maps of so many images for each thread.
void mixer_stack(const MixerStack& stack, int64_t begin, int64_t end, int threads);

}  // namespace convmixer_fast
