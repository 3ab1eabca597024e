#include "cpu/engine/stack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "cpu/depthwise/depthwise.h"
#include "cpu/engine/isa.h"
#include "cpu/engine/threads.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/memory.h"

namespace convmixer_fast {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the parts of a packed block begin, in floats; each on a cache line.
struct Offsets {
  int64_t taps, bias1, scale1, shift1, bias2, scale2, shift2, end;

  Offsets(int64_t c, int64_t k) {
    int64_t at = 0;
    auto next = [&](int64_t floats) {
      const int64_t begin = at;
      at += ceil_div(floats, 16) * 16;
      return begin;
    };
    taps = next(c * k * k);
    bias1 = next(c);
    scale1 = next(c);
    shift1 = next(c);
    bias2 = next(c);
    scale2 = next(c);
    shift2 = next(c);
    end = at;
  }
};

// The fewest channels of a thread's own: every thread makes Strassen's sums of all panels again.
constexpr int64_t kOwnedChannels = 128;

// The most threads that write panels past the caches: measured with two. Memory bandwidth is shared by all
// of them, cache bandwidth is not.
constexpr int kStreamingThreads = 4;

// The most pieces of a thread's share of the channels of a tile.
constexpr int64_t kPieces = 8;

// One thread's memory: one kernel's scratch at a time, and the plane that the depthwise one computes.
struct Scratch {
  Floats memory;
  float* kernel;
  float* plane;
};

// The partition of a stack for the machine: everything that does not change from block to block. A band is a
// stack of one block with other strides and a margin.
class Plan {
 public:
  explicit Plan(const MixerStack& stack, const MixerBand* band = nullptr)
      : s_(stack),
        band_(band),
        depthwise_(active_isa().depthwise),
        gemm_(active_isa().gemm),
        offsets_(stack.c, stack.k),
        plane_(stack.h * stack.w),
        x_image_(band == nullptr ? stack.c * plane_ : band->x_stride[0]),
        z_image_(band == nullptr ? stack.c * plane_ : band->z_stride[0]),
        z_channel_(band == nullptr ? plane_ : band->z_stride[1]),
        whole_plane_(band == nullptr ? plane_ : band->map_pixels),
        planes_(band == nullptr || band->x_stride[2] == stack.w ? 1 : 2) {
    blocks_ = depthwise_.blocks(image_problem(nullptr, nullptr), Layout::planar);
    // Two cache lines more than the values: panels of a power-of-two channel count would share a
    // few sets of the caches.
    panel_stride_ = stack.c * gemm_.panel + 32;
    groups_ = ceil_div(stack.c, gemm_.group);
    keeps_sums_ = gemm_.keeps_sums(stack.c, stack.c, whole_plane_, stack.strassen_levels);
  }

  // Of one image.
  int64_t panels_floats() const { return ceil_div(plane_, gemm_.panel) * panel_stride_; }

  Scratch scratch() const {
    const int64_t depthwise = ceil_div(blocks_.scratch_floats, 16) * 16;
    const int64_t gemm = ceil_div(gemm_.scratch_floats(s_.c, s_.c, s_.strassen_levels), 16) * 16;
    const int64_t kernel = depthwise > gemm ? depthwise : gemm;
    Scratch scratch{aligned_floats(kernel + planes_ * plane_), nullptr, nullptr};
    scratch.kernel = scratch.memory.get();
    scratch.plane = scratch.kernel + kernel;
    return scratch;
  }

  // Channels [begin, end) of the depthwise half of an image, into their places in the panels.
  void depthwise_half(const float* block, const float* image, int64_t begin, int64_t end,
                      const Scratch& scratch, float* panels, bool shared) const {
    const DepthwiseMix p = image_problem(block, image);
    depthwise_.run_panels(p, blocks_, begin, end, scratch.kernel, scratch.plane, panels,
                          panel_stride_, shared);
  }

  // Of pixels.
  int64_t tiles() const { return ceil_div(plane_, gemm_.tile); }

  // One tile of the pointwise half of block b, from panels into maps from `first` on.
  void pointwise_half(int64_t b, const float* panels, int64_t images, float* first, int64_t tile,
                      int64_t group_begin, int64_t group_end, bool again,
                      const Scratch& scratch) const {
    const float* block = s_.blocks[b];
    PanelGemm p;
    p.panels = panels + tile * gemm_.tile / gemm_.panel * panel_stride_;
    p.panel_stride = panel_stride_;
    p.images = images;
    p.weight = s_.weights[b];
    p.bias = block + offsets_.bias2;
    p.scale = block + offsets_.scale2;
    p.shift = block + offsets_.shift2;
    p.z = first;
    p.c_in = p.c_out = s_.c;
    p.z_stride = z_channel_;
    p.plane = plane_;
    p.whole_plane = whole_plane_;
    p.act = s_.act;
    p.strassen_levels = s_.strassen_levels;
    p.again = again;
    const int64_t begin = tile * gemm_.tile;
    const int64_t end = begin + gemm_.tile < plane_ ? begin + gemm_.tile : plane_;
    gemm_.run(p, begin, end, group_begin, group_end, scratch.kernel);
  }

  // Images [begin, begin + count) through the blocks, on the calling thread. Ends early after a block if
  // other threads are idle and at least two blocks are left. Returns the number of blocks done.
  int64_t whole_images(int64_t begin, int64_t count, const Scratch& scratch, float* panels,
                       const std::atomic<bool>& help) const {
    const int64_t map = s_.c * plane_;
    const float* in = s_.x + begin * map;
    float* out = s_.z + begin * map;
    for (int64_t b = 0; b < s_.depth; ++b, in = out) {
      if (b > 0 && s_.depth - b >= 2 && help.load(std::memory_order_relaxed)) return b;
      for (int64_t i = 0; i < count; ++i) {
        depthwise_half(s_.blocks[b], in + i * map, 0, s_.c, scratch, panels + i * panels_floats(), false);
      }
      for (int64_t t = 0; t < tiles(); ++t) {
        pointwise_half(b, panels, count, out, t, 0, groups_, false, scratch);
      }
    }
    return s_.depth;
  }

  // One image through the blocks from the `done`-th on, by all threads.
  void shared_image(int64_t image, int64_t done, int threads, std::vector<Scratch>& scratches,
                    float* panels) const {
    float* out = s_.z + image * z_image_;
    const float* in = done == 0 ? s_.x + image * x_image_ : out;
    // With panels past the caches, against planes and tiles of pixels in any assignment, Zen 4, 2 threads,
    // 1 image: 768/32 1.16x, 1024/20 1.11x, 1536/20 1.06x where the cores share no L3 (two cores pay even
    // for writing to halves of the same page), 0.98-1.01x where they do.
    const bool owned = threads > 1 && s_.c >= kOwnedChannels * threads;
    const int64_t unit = owned ? gemm_.group : 1;  // planes that are handed out together
    const bool shared = threads > 1 && threads <= kStreamingThreads;
    const int64_t tiles = this->tiles();
    const int64_t cuts = owned ? threads : channel_cuts(tiles, threads, groups_);
    // Work stealing: a core whose other hyperthread is busy is slower than its neighbour, which then takes
    // pieces of its cut: against whole cuts, 1 image, 2 threads, Zen 3, 1.05x (1024 channels) to 1.11x (768).
    // A cut is one piece where each piece would make the sums again.
    const int64_t bands = ceil_div(groups_ / cuts, gemm_.band);
    const int64_t pieces = threads > 1 && keeps_sums_ ? std::clamp<int64_t>(bands, 1, kPieces) : 1;
    for (int64_t b = done; b < s_.depth; ++b, in = out) {
      const float* block = s_.blocks[b];
      parallel_for(ceil_div(s_.c, unit), threads, [&](Share& share) {
        const Scratch& mine = scratches[share.thread()];
        for (Range r; share.next(r);) {
          depthwise_half(block, in, r.begin * unit, std::min(r.end * unit, s_.c), mine, panels, shared);
        }
      });
      parallel_for(cuts * tiles * pieces, threads, [&](Share& share) {
        const Scratch& mine = scratches[share.thread()];
        int64_t last_tile = -1;
        for (Range r; share.next(r);) {
          for (int64_t i = r.begin; i < r.end; ++i) {
            const int64_t piece = i % pieces, tile = i / pieces % tiles, cut = i / pieces / tiles;
            const int64_t first = groups_ * cut / cuts, last = groups_ * (cut + 1) / cuts;
            // Whole bands, but for the last piece.
            auto edge = [&](int64_t n) {
              const int64_t all = ceil_div(last - first, gemm_.band);
              return std::min(first + all * n / pieces * gemm_.band, last);
            };
            pointwise_half(b, panels, 1, out, tile, edge(piece), edge(piece + 1), tile == last_tile, mine);
            last_tile = tile;
          }
        }
      });
    }
  }

 private:
  DepthwiseMix image_problem(const float* block, const float* image) const {
    DepthwiseMix p;
    p.x = image;
    p.y = nullptr;
    const int64_t strides[4] = {s_.c * plane_, plane_, s_.w, 1};
    for (int axis = 0; axis < 4; ++axis) p.x_stride[axis] = p.y_stride[axis] = strides[axis];
    if (band_ != nullptr) {
      for (int axis = 0; axis < 3; ++axis) p.x_stride[axis] = band_->x_stride[axis];
      p.above = band_->above;
      p.below = band_->below;
      p.left = band_->left;
      p.right = band_->right;
    }
    p.n = 1;
    p.c = s_.c;
    p.h = s_.h;
    p.w = s_.w;
    p.k = s_.k;
    auto part = [&](int64_t offset) { return block == nullptr ? nullptr : block + offset; };
    p.weight = part(offsets_.taps);
    p.bias = part(offsets_.bias1);
    p.scale = part(offsets_.scale1);
    p.shift = part(offsets_.shift1);
    p.act = s_.act;
    return p;
  }

  const MixerStack& s_;
  const MixerBand* const band_;
  const DepthwiseKernels& depthwise_;
  const GemmKernels& gemm_;
  const Offsets offsets_;
  const int64_t plane_, x_image_, z_image_, z_channel_, whole_plane_;
  const int64_t planes_;  // that the depthwise kernel needs for one channel
  DepthwiseBlocks blocks_;
  int64_t panel_stride_, groups_;
  bool keeps_sums_;
};

}  // namespace

int64_t mixer_packed_floats(int64_t c, int64_t k) { return Offsets(c, k).end; }

void mixer_pack(const MixerBlock& block, int64_t c, int64_t k, float* packed) {
  const Offsets at(c, k);
  std::memset(packed, 0, at.end * sizeof(float));
  auto vector = [&](const float* from, int64_t offset, int64_t count) {
    if (from != nullptr) std::memcpy(packed + offset, from, count * sizeof(float));
  };
  vector(block.taps, at.taps, c * k * k);
  vector(block.bias1, at.bias1, c);
  vector(block.scale1, at.scale1, c);
  vector(block.shift1, at.shift1, c);
  vector(block.bias2, at.bias2, c);
  vector(block.scale2, at.scale2, c);
  vector(block.shift2, at.shift2, c);
}

int64_t joined_pixels(int64_t c_in, int64_t c_out, int strassen_levels) {
  const GemmKernels& gemm = active_isa().gemm;
  const int64_t large = int64_t{1} << 40;
  return gemm.uses_strassen(c_in, c_out, large, strassen_levels) ? 2 * gemm.panel : 1;
}

int64_t mixer_images(int64_t h, int64_t w) {
  const GemmKernels& gemm = active_isa().gemm;
  const int64_t padded = ceil_div(h * w, gemm.panel) * gemm.panel;
  return padded == 0 || padded > gemm.tile ? 1 : gemm.tile / padded;
}

void mixer_stack(const MixerStack& stack, int64_t begin, int64_t end, int threads) {
  if (begin >= end || stack.c == 0 || stack.h == 0 || stack.w == 0) return;
  const Plan plan(stack);
  const int64_t most = mixer_images(stack.h, stack.w);
  // Images that are left to all threads, and how many of their blocks are done.
  struct Rest {
    int64_t image, done;
  };
  std::vector<Rest> rests;
  // While each thread has one: as many images together as fit into a tile, which share the packing of the
  // weights.
  while (end - begin >= threads) {
    const int64_t together = std::min(most, (end - begin) / threads);
    const int64_t items = (end - begin) / together / threads * threads;
    std::atomic<bool> idle{false};
    std::mutex mutex;
    parallel_for(items, threads, [&](Share& share) {
      const Scratch scratch = plan.scratch();
      const Floats panels = aligned_floats(together * plan.panels_floats());
      for (Range r; share.next(r);) {
        for (int64_t i = r.begin; i < r.end; ++i) {
          const int64_t first = begin + i * together;
          const int64_t done = plan.whole_images(first, together, scratch, panels.get(), idle);
          if (done == stack.depth) continue;
          const std::lock_guard<std::mutex> lock(mutex);
          for (int64_t n = 0; n < together; ++n) rests.push_back({first + n, done});
        }
      }
      idle = true;
    });
    begin += items * together;
  }
  for (; begin < end; ++begin) rests.push_back({begin, 0});
  if (rests.empty()) return;
  const Floats panels = aligned_floats(plan.panels_floats());
  std::vector<Scratch> scratches;
  for (int i = 0; i < threads; ++i) scratches.push_back(plan.scratch());
  for (const Rest& rest : rests) {
    plan.shared_image(rest.image, rest.done, threads, scratches, panels.get());
  }
}

void mixer_band(const MixerBand& band, int threads) {
  if (band.n == 0 || band.c == 0 || band.h == 0 || band.w == 0) return;
  MixerStack stack;
  stack.x = band.x;
  stack.z = band.z;
  stack.n = band.n;
  stack.c = band.c;
  stack.h = band.h;
  stack.w = band.w;
  stack.k = band.k;
  stack.blocks = &band.block;
  stack.weights = &band.weight;
  stack.depth = 1;
  stack.act = band.act;
  stack.strassen_levels = band.strassen_levels;
  const Plan plan(stack, &band);
  const Floats panels = aligned_floats(plan.panels_floats());
  std::vector<Scratch> scratches;
  for (int i = 0; i < threads; ++i) scratches.push_back(plan.scratch());
  for (int64_t i = 0; i < band.n; ++i) plan.shared_image(i, 0, threads, scratches, panels.get());
}

}  // namespace convmixer_fast
