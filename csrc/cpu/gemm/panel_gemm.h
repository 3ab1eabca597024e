// The GEMM of packed panels with its epilogue, float32, inference:
//
//   z[n,co,p] = scale[co] * act(bias[co] + sum_k weight[co,k] * y[n,k,p]) + shift[co]
//
// y comes in packed panels, z goes out planar; the weights are read where and as PyTorch keeps them: no
// second copy of them fills memory or goes stale.
//
// Two algorithms (f32.cpp): direct, and one level of Strassen's (strassen.h), 7 products of half matrices
// instead of 8. The sums are cut by the image alone: neither the thread count nor the batch changes a bit of
// z. Strassen's sums join neighbouring pixels and output channels; pixels with values that are not finite
// are kept out of them, weights that are not finite reach the channels of their group.
//
// Panels: kPanel neighbouring pixels of one image, of all channels, [pixel / kPanel][k][kPanel], kPanel two
// vectors (four with AVX-512); the rest of the last panel of an image may hold anything.
#pragma once

#include <cstdint>
#include <numeric>

#include "common/activation.h"

namespace convmixer_fast {

// Instead of a number of levels of Strassen's algorithm: the one with which the instruction set is fastest.
constexpr int kFastestLevels = -1;

struct PanelGemm {
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
  int64_t whole_plane;   // pixels of the image: it selects the algorithm, which is the same for every band
  Activation act;
  int strassen_levels;   // 0, 1 (where the size allows it), or kFastestLevels
  bool again = false;    // the last run with this scratch was of the same pixels of the same panels
};

// The kernels of one instruction set.
struct GemmKernels {
  int64_t panel;  // pixels of a panel
  int64_t tile;   // pixels that are multiplied with all weights together
  int64_t group;  // output channels that are multiplied together
  int64_t band;   // groups that take turns with a panel

  // Whether Strassen's algorithm is taken at this size with that many levels asked for.
  bool (*uses_strassen)(int64_t c_in, int64_t c_out, int64_t plane, int asked_levels);

  // Whether a run with `again` finds the sums that the last one made of its panels.
  bool (*keeps_sums)(int64_t c_in, int64_t c_out, int64_t plane, int asked_levels);

  // Scratch of one `run`, in floats; 64-byte aligned.
  int64_t (*scratch_floats)(int64_t c_in, int64_t c_out, int asked_levels);

  // Pixels [pixel_begin, pixel_end) of each image, together at most a tile, by groups
  // [group_begin, group_end); pixel_begin is a multiple of `tile`. Neither allocates nor throws.
  void (*run)(const PanelGemm&, int64_t pixel_begin, int64_t pixel_end, int64_t group_begin,
              int64_t group_end, float* scratch);
};

// The number of shares of the output channels that `tiles` tiles of pixels are cut into: the fewest that
// give every thread the same number of pieces, because every piece makes the sums of its panels again. Many
// tiles are shared out evenly without cuts.
inline std::int64_t channel_cuts(std::int64_t tiles, int threads, std::int64_t groups) {
  const std::int64_t cuts = tiles < 4 * threads ? threads / std::gcd<std::int64_t>(tiles, threads) : 1;
  return cuts < groups ? cuts : groups;
}

}  // namespace convmixer_fast
