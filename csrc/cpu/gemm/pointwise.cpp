#include "cpu/gemm/pointwise.h"

#include <algorithm>
#include <cstring>

#include "cpu/engine/isa.h"
#include "cpu/engine/threads.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/memory.h"

namespace convmixer_fast {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below this a parallel region costs more than it saves (depthwise.cpp).
constexpr double kSerialMultiplyAdds = 1 << 17;

// Pixels [begin, end) of image n into panels, zeros after the last one.
void pack(const Pointwise& p, int64_t n, int64_t begin, int64_t end, int64_t panel,
          int64_t panel_stride, float* to) {
  const int64_t across = p.w / p.patch, pixels = end - begin;
  const float* image = p.x + n * p.x_stride[0];
  const int64_t tail = ceil_div(pixels, panel) * panel - pixels;
  int64_t k = 0;
  for (int64_t c = 0; c < p.c; ++c) {
    for (int64_t dy = 0; dy < p.patch; ++dy) {
      for (int64_t dx = 0; dx < p.patch; ++dx, ++k) {
        float* const channel = to + k * panel;
        const float* from = image + c * p.x_stride[1] + dy * p.x_stride[2] + dx * p.x_stride[3];
        const int64_t step = p.patch * p.x_stride[3];
        // Runs that end with a row of x or with a panel.
        for (int64_t pixel = 0; pixel < pixels;) {
          const int64_t i = (begin + pixel) / across, j = (begin + pixel) % across;
          const int64_t at = pixel % panel;
          const int64_t run = std::min({across - j, panel - at, pixels - pixel});
          const float* row = from + i * p.patch * p.x_stride[2] + j * step;
          float* values = channel + pixel / panel * panel_stride + at;
          if (step == 1) {
            std::memcpy(values, row, static_cast<std::size_t>(run) * sizeof(float));
          } else {
            for (int64_t r = 0; r < run; ++r) values[r] = row[r * step];
          }
          pixel += run;
        }
        float* last = channel + (pixels - 1) / panel * panel_stride + (pixels - 1) % panel + 1;
        std::fill(last, last + tail, 0.0f);
      }
    }
  }
}

}  // namespace

void pointwise(const Pointwise& p, int threads) {
  const int64_t down = p.h / p.patch, across = p.w / p.patch, plane = down * across;
  if (p.n == 0 || p.c_out == 0 || plane == 0) return;
  const GemmKernels& kernels = active_isa().gemm;
  const int64_t c_in = p.c * p.patch * p.patch;
  const int64_t tiles = ceil_div(plane, kernels.tile);
  const int64_t groups = ceil_div(p.c_out, kernels.group);
  // Fewer tiles than threads: each is cut by output channels as well.
  if (1.0 * p.n * plane * c_in * p.c_out < kSerialMultiplyAdds) threads = 1;
  const int64_t cuts = channel_cuts(p.n * tiles, threads, groups);
  const int64_t panel_stride = c_in * kernels.panel + 32;
  const int64_t tile_panels = ceil_div(std::min(plane, kernels.tile), kernels.panel);
  const int64_t panels = ceil_div(tile_panels * panel_stride, 16) * 16;
  parallel_for(p.n * tiles * cuts, threads, [&](Share& share) {
    const Floats memory =
        aligned_floats(panels + kernels.scratch_floats(c_in, p.c_out, p.strassen_levels));
    float* const scratch = memory.get() + panels;
    for (Range r; share.next(r);) {
      for (int64_t item = r.begin; item < r.end; ++item) {
        const int64_t cut = item % cuts, tile = item / cuts % tiles, n = item / cuts / tiles;
        const int64_t begin = tile * kernels.tile, end = std::min(begin + kernels.tile, plane);
        pack(p, n, begin, end, kernels.panel, panel_stride, memory.get());
        PanelGemm one;
        one.panels = memory.get();
        one.panel_stride = panel_stride;
        one.weight = p.weight;
        one.bias = p.bias;
        one.scale = p.scale;
        one.shift = p.shift;
        one.z = p.z + n * p.c_out * plane;
        one.c_in = c_in;
        one.c_out = p.c_out;
        one.z_stride = one.plane = one.whole_plane = plane;
        one.act = p.act;
        one.strassen_levels = p.strassen_levels;
        kernels.run(one, begin, end, groups * cut / cuts, groups * (cut + 1) / cuts, scratch);
      }
    }
  });
}

}  // namespace convmixer_fast
