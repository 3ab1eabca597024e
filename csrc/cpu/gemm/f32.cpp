// The float32 GEMM of one instruction set: the loop nest. Compiled once for each (simd.h).
//
// for each chunk of input channels
//   Strassen's sums of the tile's panels, made once
//   for each band of 4 (M = 12: 2) groups of 2 * M output channels
//     its weights of the chunk, or Strassen's sums of them, packed into [M][k] operands: L2
//     for each 8 pairs of panels                      whose products stay in L2
//       for each of the 7 products of half matrices
//         for each panel                              from L3 into L2, once a band
//           for each piece of its half chunk of k     AVX-512: of 64, in L1; otherwise one, the whole
//             for each group of the band
//               micro-kernel: M x V vectors of accumulators over the piece
//       last chunk: bias, activation, scale, shift, rows of z; otherwise added to the tile's results
//     for each panel that has no partner              directly: the four blocks of weights as they are
//       the same pieces and groups; after the last chunk the epilogue
//
// The files: microkernel_f32.h (registers), blocking_f32.h (caches), pack_f32.h (weights), strassen.h (sums),
// store_f32.h (epilogue). y is packed by its producers: the depthwise kernel and pointwise.cpp.
//
// The last panel of a plane may be partly empty; only its V occupied vectors are multiplied, directly, which
// is as fast there: Strassen's algorithm saves a quarter of one panel of a pair.
#include "cpu/gemm/blocking_f32.h"
#include "cpu/gemm/microkernel_f32.h"
#include "cpu/gemm/pack_f32.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/gemm/store_f32.h"
#include "cpu/gemm/strassen.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

// The most single panels of a tile for which weights are read where they are. A copy of a band's weights
// waits for memory: with more panels, their products prefetch all of the next band's rows in time.
constexpr int64_t kInPlacePanels = 2;

// The single panels of a tile by `count` whole groups from channel `first` on, for one chunk, with no copy of
// the weights. Every piece of kSum terms is multiplied by all groups before the next, and each prefetches the
// weights of its successor: at the end of the rows those of the next band, where there is one. The sums have
// the pieces of multiply_groups, and so the same bits.
void band_in_place(const PanelGemm& p, const Chunk& t, const Panels& panels, int64_t first,
                   int64_t count, bool more, float* band_results) {
  constexpr int64_t kResult = int64_t{kGroupRows} * kPanel;
  const int64_t length = t.kc + t.rest, blocks = 2 * count;
  for (int64_t i = 0; i < panels.singles; ++i) {
    const float* panel = p.panels + panels.single[i] * p.panel_stride + t.k0 * kPanel;
    with_vectors(panel_vectors(p.plane, panels.pixel_of(panels.single[i])), [&](auto v) {
      for (int64_t k = 0, end = t.kc; k < length; end = k < t.kc ? t.kc : length) {
        const int64_t terms = min(kSum, end - k), then = k + terms;
        for (int64_t g = 0; g < blocks; ++g) {
          const float* weight = p.weight + (first + g * kRows) * p.c_in + t.k0;
          const float* next_band = more ? weight + blocks * kRows * p.c_in : weight;
          multiply_in_place<kRows, decltype(v)::value>(
              panel + k * kPanel, weight + k, p.c_in, terms,
              then < length ? weight + then : next_band, !t.first || k > 0,
              band_results + g / 2 * kGroupFloats + panels.single[i] * kResult +
                  g % 2 * (kRows * kPanel));
        }
        k = then;
      }
    });
  }
}

// `count` groups of 2 * M output channels from `first` on, for one chunk.
template <int M, int64_t kRow>
__attribute__((noinline)) void band(const PanelGemm& p, const Chunk& t, const Panels& panels,
                                    int64_t first, int64_t count, int64_t end,
                                    const Scratch& scratch, float* band_results,
                                    const WeightRows& next_weights) {
  constexpr int64_t kOperand = M * kRow, kResult = int64_t{2} * M * kPanel;
  constexpr int64_t kProduct = M * kPanel;
  constexpr int64_t kGroupProducts = Scratch::kBlock * kProducts * kProduct;
  const bool strassen = panels.pairs > 0, direct = panels.singles > 0;
  const bool in_place = M == kRows && !strassen && panels.singles <= kInPlacePanels &&
                        first + count * kGroupRows <= p.c_out;
  for (int64_t g = 0; g < count && !in_place; ++g) {
    float* operands = scratch.operands + g * (kOperands * kOperand);
    pack_operands<M, kRow>(p, t, first + g * (2 * M), strassen, direct, operands);
  }
  auto result = [&](int64_t group, int64_t panel) {
    return band_results + group * kGroupFloats + panel * kResult;
  };

  // What comes from L3 or memory is prefetched while this band multiplies: the results of earlier chunks,
  // for the end of this function, and the next band's weights.
  const int64_t results_ahead = t.first ? 0 : panels.pairs * count;
  int64_t asked = 0;
  auto ahead = [&](const float* nothing) {
    const int64_t i = asked++;
    if (i < results_ahead) {
      return static_cast<const float*>(result(i / panels.pairs, panels.pair[i % panels.pairs]));
    }
    const int64_t row = i - results_ahead;
    return row < next_weights.count ? next_weights(row) : nothing;
  };

  GroupVectors group_vectors[kBand] = {};
  if (t.last) {
    for (int64_t g = 0; g < count; ++g) {
      const int64_t channel = first + g * (2 * M), rows = min(2 * M, end - channel);
      for (int64_t m = 0; m < rows; ++m) {
        group_vectors[g].bias[m] = p.bias != nullptr ? p.bias[channel + m] : 0.0f;
        group_vectors[g].scale[m] = p.scale[channel + m];
        group_vectors[g].shift[m] = p.shift[channel + m];
      }
    }
  }

  if (strassen) {
    const int64_t sum = t.kc * kPanel, step = kPairs * sum;
    auto factor_of = [&](int product, int64_t i) {
      const float* panel = p.panels + panels.pair[i] * p.panel_stride + t.k0 * kPanel;
      return factor(product, pair_at(panel, p.panel_stride, t.kc), scratch.sums + i * sum, step);
    };
    for (int64_t begin = 0; begin < panels.pairs; begin += Scratch::kBlock) {
      const int64_t end_pair = min(begin + Scratch::kBlock, panels.pairs);
      const float* b = factor_of(0, begin);
      for (int product = 0; product < kProducts; ++product) {
        for (int64_t i = begin; i < end_pair; ++i) {
          const int64_t next_block = end_pair < panels.pairs ? end_pair : 0;
          const float* next = i + 1 < end_pair          ? factor_of(product, i + 1)
                              : product + 1 < kProducts ? factor_of(product + 1, begin)
                                                        : factor_of(0, next_block);
          const float* asked_for[kBand];
          for (int64_t g = 0; g < count; ++g) asked_for[g] = ahead(b);
          multiply_groups<M, kVectors, kRow>(
              b, t.kc, next, count,
              [&](int64_t g) { return scratch.operands + (g * kOperands + product) * kOperand; },
              [&](int64_t g) { return asked_for[g]; }, false,
              [&](int64_t g) {
                return scratch.products + g * kGroupProducts +
                       ((i - begin) * kProducts + product) * kProduct;
              });
          b = next;
        }
      }
      for (int64_t g = 0; g < count; ++g) {
        for (int64_t i = begin; i < end_pair; ++i) {
          const int64_t pair = panels.pair[i];
          const float* products =
              scratch.products + g * kGroupProducts + (i - begin) * (kProducts * kProduct);
          float* left = result(g, pair);
          if (t.last) {
            const int64_t channel = first + g * (2 * M);
            store_pair(p, group_vectors[g], channel, min(2 * M, end - channel), M,
                       pair / panels.per_image, panels.pixel_of(pair), products,
                       t.first ? nullptr : left);
          } else {
            combine<M>(products, left, left + kResult, !t.first);
          }
        }
      }
    }
  }

  if (in_place) band_in_place(p, t, panels, first, count, next_weights.count > 0, band_results);
  for (int64_t i = 0; i < panels.singles && !in_place; ++i) {
    auto panel = [&](int64_t n) {
      return p.panels + panels.single[n] * p.panel_stride + t.k0 * kPanel;
    };
    const int64_t vectors = panel_vectors(p.plane, panels.pixel_of(panels.single[i]));
    const float* b1 = panel(i);
    const float* b2 = b1 + t.kc * kPanel;
    const float* next = i + 1 < panels.singles ? panel(i + 1) : b1;
    auto half = [&](const float* b, Operand top, Operand bottom, int64_t kc, const float* then,
                    bool add) {
      const float* asked_for[2 * kBand];
      for (int64_t g = 0; g < 2 * count; ++g) asked_for[g] = ahead(b);
      with_vectors(vectors, [&](auto v) __attribute__((always_inline)) {
        multiply_groups<M, decltype(v)::value, kRow>(
            b, kc, then, 2 * count,
            [&](int64_t g) {
              return scratch.operands + (g / 2 * kOperands + (g % 2 == 0 ? top : bottom)) * kOperand;
            },
            [&](int64_t g) { return asked_for[g]; }, add,
            [&](int64_t g) { return result(g / 2, panels.single[i]) + g % 2 * kProduct; });
      });
    };
    half(b1, kA11, kA21, t.kc, b2, !t.first);
    half(b2, kA12, kA22, t.rest, next, true);
  }
  if (!t.last) return;

  for (int64_t g = 0; g < count; ++g) {
    const int64_t channel = first + g * (2 * M), rows = min(2 * M, end - channel);
    if (rows <= 0) break;
    for (int64_t i = 0; i < panels.singles; ++i) {
      const int64_t panel = panels.single[i], pixel = panels.pixel_of(panel);
      with_vectors(panel_vectors(p.plane, pixel), [&](auto v) {
        store_panel<decltype(v)::value>(p, group_vectors[g], channel, rows, panel / panels.per_image,
                                        pixel, result(g, panel));
      });
    }
  }
}

// Output channels [begin, end) of the panels of a tile, whose sums are to be made or `made` already.
template <int64_t kRow>
void multiply(const PanelGemm& p, const Panels& panels, int64_t begin, int64_t end, bool made,
              const Scratch& scratch) {
  const int64_t length = chunk_length(p.c_in);
  // Whole groups in bands; a last group that is not whole is a band by itself.
  auto band_groups = [](int64_t first, int64_t last) {
    return min(kBand, max((last - first) / kGroupRows, 1));
  };
  for (int64_t k0 = 0; k0 < p.c_in; k0 += length) {
    Chunk t;
    const int64_t channels = min(length, p.c_in - k0);
    t.k0 = k0;
    t.rest = channels / 2;
    t.kc = channels - t.rest;
    t.first = k0 == 0;
    t.last = k0 + length >= p.c_in;
    const int64_t step = kPairs * t.kc * kPanel;
    for (int64_t i = 0; !made && i < panels.pairs; ++i) {
      const float* panel = p.panels + panels.pair[i] * p.panel_stride + k0 * kPanel;
      pair_sums(pair_at(panel, p.panel_stride, t.kc), t.kc, step, scratch.sums + i * t.kc * kPanel);
    }
    for (int64_t first = begin; first < end;) {
      const int64_t count = band_groups(first, end), rows = min(kGroupRows, end - first);
      const int64_t next = first + count * kGroupRows;
      float* results = scratch.results;
      if (length < p.c_in) results += (first - begin) / kGroupRows * kGroupFloats;
      // The rows after the last band are those of the next run. A last group that is not whole is not
      // prefetched.
      const int64_t last = next >= end && t.last ? p.c_out : end;
      const WeightRows ahead = {p.weight + next * p.c_in + k0, p.c_in,
                                next + kGroupRows <= last ? band_groups(next, last) * kGroupRows : 0};
      auto run = [&](auto m) {
        band<decltype(m)::value, kRow>(p, t, panels, first, count, end, scratch, results, ahead);
      };
      switch (ceil_div(rows, 2 * kRowStep)) {
        case 3: run(Index<kRows>{}); break;
        case 2: run(Index<2 * kRowStep>{}); break;
        default: run(Index<kRowStep>{}); break;
      }
      first = next;
    }
  }
}

void run(const PanelGemm& p, int64_t pixel_begin, int64_t pixel_end, int64_t group_begin,
         int64_t group_end, float* memory) {
  const Scratch scratch(memory, p.c_in, p.c_out);
  const int64_t count = ceil_div(pixel_end - pixel_begin, kPanel), all = p.images * count;
  const bool strassen = uses_strassen(p.c_in, p.c_out, p.whole_plane, p.strassen_levels);
  const int64_t begin = group_begin * kGroupRows, end = min(group_end * kGroupRows, p.c_out);
  bool* const clean = scratch.clean;
  for (int64_t i = 0; !p.again && i < all; ++i) {
    clean[i] = strassen && whole_panel(p.plane, pixel_begin + i % count * kPanel) &&
               finite(p.panels + i * p.panel_stride, p.c_in);
  }
  const bool made = p.again && keeps_sums(p.c_in, p.c_out, p.whole_plane, p.strassen_levels);
  Panels panels;
  panels.pixel = pixel_begin;
  panels.per_image = count;
  // Pairs are counted from an image's first panel: whatever else is in the tile, it is computed alike.
  for (int64_t i = 0; i < all; ++i) {
    const int64_t at = i % count;
    if (at % 2 == 0 && at + 1 < count && clean[i] && clean[i + 1]) {
      panels.pair[panels.pairs++] = i++;
    } else {
      panels.single[panels.singles++] = i;
    }
  }
  if (kShort < kHalf && chunk_length(p.c_in) <= 2 * kShort) {
    multiply<row_stride(kShort)>(p, panels, begin, end, made, scratch);
  } else {
    multiply<row_stride(kHalf)>(p, panels, begin, end, made, scratch);
  }
}

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {kPanel,        kTile,      kGroupRows,      kBand,
                                  uses_strassen, keeps_sums, Scratch::floats, run};

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
