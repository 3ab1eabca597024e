// A stack of ConvMixer blocks in one call, float32, inference, planar (NCHW) maps:
//
//   y = x + scale1 * act(depthwise(x) + bias1) + shift1        (depthwise.h)
//   z = scale2 * act(W y + bias2) + shift2                     (panel_gemm.h)
//
// y exists only as packed panels: the depthwise kernel writes its plane of one channel, in L1 or L2, straight
// into them, and the GEMM reads nothing else. x and z are the only maps in memory; from the second block on z
// overwrites x.
//
// Threads: while at least as many images are left as threads, each thread computes whole images through the
// whole stack, with no barrier, until one thread finds no more. The images that the others hold then, and
// batches smaller than the number of threads, are shared: planes, then output channels of tiles of pixels,
// with a barrier after each half. There a thread has the same channels in both halves, so that it alone reads
// and writes their planes, and only panels go from core to core: past the caches, because a line that another
// core holds must be invalidated before it can be written. Every value is computed alike either way.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace convmixer_fast {

// One block's parameters except the pointwise weights, in one piece of memory (mixer_packed_floats
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
  int strassen_levels;  // of Strassen's algorithm (panel_gemm.h)
};

// One block on a band of a larger map: rows [0, h) and columns [0, w) of z from x and the pixels around it.
// Zeros are padded only at the map's own border.
//
// A pixel of z has the bits that it has in the map as a whole; under Strassen's algorithm only if it keeps
// its neighbours: see joined_pixels.
struct MixerBand {
  const float* x;       // at the first pixel of the output; w stride 1
  int64_t x_stride[3];  // n, c, h
  int64_t above, below, left, right;  // rows and columns around it that are the map's own
  float* z;             // no part of x; pixels of a channel are contiguous
  int64_t z_stride[2];  // n, c
  int64_t n, c, h, w;
  int64_t k;
  const float* block;   // packed
  const float* weight;  // [c][c]
  Activation act;
  int strassen_levels;
  int64_t map_pixels;   // of the whole map
};

// On at most `threads` threads, image by image. Throws std::bad_alloc when there is no memory for the
// panels of the band; z is then unspecified.
void mixer_band(const MixerBand& band, int threads);

// The number of neighbouring pixels, counted from a map's first, that may be multiplied together: bands of
// whole such groups give the bits of the whole map. 1 for the direct GEMM.
int64_t joined_pixels(int64_t c_in, int64_t c_out, int strassen_levels);

// The number of images of that size that a thread computes together.
int64_t mixer_images(int64_t h, int64_t w);

// Images [begin, end) on at most `threads` threads; callers cut a large batch to stay
// interruptible, best into multiples of threads * mixer_images. Throws std::bad_alloc when there is
// no memory for the panels: the maps of so many images for each thread.
void mixer_stack(const MixerStack& stack, int64_t begin, int64_t end, int threads);

}  // namespace convmixer_fast
