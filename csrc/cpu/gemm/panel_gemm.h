// The pointwise half of a ConvMixer block (its channel mixing), float32, inference:
//
//   z[n,co,p] = scale[co] * act(bias[co] + sum_k weight[co,k] * y[n,k,p]) + shift[co]
//
// y comes in packed panels, z goes out planar; the weights are read where and as PyTorch keeps
// them, so that there is no second copy of them to fill memory or to go stale.
//
// Two ways to multiply (pointwise_kernel.cpp): directly, or by Strassen's algorithm, 7 products of half
// matrices in the place of 8, in one level or two. Either way the sums are cut by the image alone:
// neither the thread count nor the batch changes a bit of z. Strassen's sums join pixels and output
// channels that are neighbours; pixels with values that are not finite are kept out of them, weights
// that are not finite reach the channels of their group.
//
// Panels: kPanel neighbouring pixels of one image, of all channels, [pixel / kPanel][k][kPanel],
// kPanel two vectors; the last panel of an image is filled up with anything.
#pragma once

#include <cstdint>
#include <numeric>

#include "common/activation.h"

namespace convmixer_fast {

// Levels of Strassen's algorithm, instead of a number of them: as many as the instruction set is fastest
// with, and one at most.
constexpr int kFastestLevels = -1;

struct Pointwise {
  const float* panels;   // of an image's pixels from pixel_begin on
  int64_t panel_stride;  // floats from one panel to the next
  int64_t images = 1;    // more than one where all of their panels, one after the other, are a tile
  const float* weight;   // [c_out][c_in]
  const float* bias;     // [c_out], or null; scale and shift [c_out]
  const float* scale;
  const float* shift;
  float* z;              // [image][c_out][z_stride], of which `plane` are written
  int64_t z_stride;
  int64_t c_in, c_out;
  int64_t plane;         // pixels of the image, or of the band of it
  int64_t whole_plane;   // pixels of the image: what is multiplied how is the same for every band
  Activation act;
  int strassen_levels;   // at most; taken where the size allows, or kFastestLevels
  bool again = false;    // the last run with this scratch was of the same pixels of the same panels
};

// One instruction set's kernels.
struct PointwiseKernels {
  int64_t panel;  // pixels of a panel
  int64_t tile;   // pixels that go through all weights together

  // Output channels of a group, which are multiplied together, and groups that use a panel in turns.
  int64_t (*group)(int levels);
  int64_t band;

  // How many levels of Strassen's algorithm are taken at this size, of those asked for.
  int (*strassen_levels)(int64_t c_in, int64_t c_out, int64_t plane, int asked);

  // Whether a run again finds there what the last one made of its panels.
  bool (*keeps_sums)(int64_t c_in, int64_t c_out, int64_t plane, int asked_levels);

  // Scratch of one `run`, in floats; 64-byte aligned.
  int64_t (*scratch_floats)(int64_t c_in, int64_t c_out, int asked_levels);

  // Pixels [pixel_begin, pixel_end) of each image, together at most a tile, of groups
  // [group_begin, group_end) of the levels that are taken; pixel_begin is a multiple of `tile`. Neither
  // allocates nor throws.
  void (*run)(const Pointwise&, int64_t pixel_begin, int64_t pixel_end, int64_t group_begin,
              int64_t group_end, float* scratch);
};

// Into how many shares of the output channels `tiles` tiles of pixels are cut: into as few as give
// every thread the same number of pieces, since every piece makes the sums of its panels anew. Many
// tiles are shared out evenly as they are.
inline std::int64_t channel_cuts(std::int64_t tiles, int threads, std::int64_t groups) {
  const std::int64_t cuts = tiles < 4 * threads ? threads / std::gcd<std::int64_t>(tiles, threads) : 1;
  return cuts < groups ? cuts : groups;
}

}  // namespace convmixer_fast
