// The pointwise half of a ConvMixer block (its channel mixing), float32, inference:
//
//   z[n,co,p] = scale[co] * act(bias[co] + sum_k weight[co,k] * y[n,k,p]) + shift[co]
//
// y comes in packed panels, z goes out planar. Each sum is the bias and the sums of equal blocks of
// k, in order, each of them its products in the order of k, one multiply-add each: neither the
// thread count, nor the batch, nor the place of a pixel in its panel change a bit of it.
//
// Panels: kPanel neighbouring pixels of all channels, [pixel / kPanel][k][kPanel], kPanel two
// vectors. Pixels are counted through all images, pixel = n * plane + p; the last panel is filled
// up with anything.
// Packed weights: groups of `rows` output channels, [co / rows][k][rows], what one tile of
// accumulators needs for one k side by side; the last group may be one or two thirds as high.
#pragma once

#include <cstdint>

#include "activation_id.h"

namespace convmixer_fast {

struct Pointwise {
  const float* panels;
  int64_t panel_stride;  // floats from one panel to the next
  const float* weight;   // packed
  const float* bias;     // as many as packed_channels says, and scale and shift likewise
  const float* scale;
  const float* shift;
  float* z;              // [image][co][plane]
  int64_t c_in, c_out;
  int64_t pixels;        // of all images
  int64_t plane;         // pixels of one image
  Activation act;
};

// One instruction set's kernels.
struct PointwiseKernels {
  int64_t panel;       // pixels of a panel
  int64_t tile;        // pixels that go through all weights together: their panels stay in L2
  int64_t row_groups;  // output channels of a group

  // Output channels with the padding of the last group.
  int64_t (*packed_channels)(int64_t c_out);

  // weight [c_out][c_in] -> packed, packed_channels(c_out) * c_in floats.
  void (*pack)(const float* weight, int64_t c_out, int64_t c_in, float* packed);

  // Pixels [pixel_begin, pixel_end) of groups [group_begin, group_end); pixel_begin is a multiple
  // of `panel`. Neither allocates nor throws.
  void (*run)(const Pointwise&, int64_t pixel_begin, int64_t pixel_end, int64_t group_begin,
              int64_t group_end);
};

}  // namespace convmixer_fast
