// The float32 epilogue pass of one instruction set. Compiled once for each (simd.h).
//
// for each piece of at most 16 KB (half of L1)
//   for each group of vectors: loads, the activation of all in step, multiply-adds, stores
// planar: a piece lies within one plane and has one scale and shift; channels-last: a piece is
// whole pixels, and scale and shift are read along with the values. Ends that fill no group go
// through a buffer that does.
#include "cpu/epilogue.h"
#include "cpu/epilogue/pass.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

using S = Simd<kLanes>;
using Float = S::Float;

constexpr int64_t kPieceFloats = 4096;
constexpr int kGroupFloats = kGroup * kLanes;

int64_t pixels_in_piece(const Epilogue& p) { return max(kPieceFloats / p.c, 1); }

int64_t pieces(const Epilogue& p, Layout layout) {
  return layout == Layout::planar ? p.n * p.c * ceil_div(p.pixels, kPieceFloats)
                                  : ceil_div(p.n * p.pixels, pixels_in_piece(p));
}

// kStep is kLanes where each vector has scales of its own, 0 where all share one.
template <Activation A, int kStep>
CMF_INLINE void group_at(float* h, const float* scale, const float* shift) {
  Float values[kGroup];
  static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    values[I] = S::load(h + I * kLanes);
  });
  activate<A, kLanes, kGroup>(values);
  static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    S::store(h + I * kLanes, values[I] * S::load(scale + I * kStep) + S::load(shift + I * kStep));
  });
}

// `count` neighbouring values, from h on.
template <Activation A, int kStep>
CMF_INLINE void row(float* h, int64_t count, const float* scale, const float* shift) {
  int64_t i = 0;
  CMF_ROLLED
  for (; i + kGroupFloats <= count; i += kGroupFloats) {
    group_at<A, kStep>(h + i, scale + (kStep > 0 ? i : 0), shift + (kStep > 0 ? i : 0));
  }
  if (i == count) return;
  float values[kGroupFloats] = {};
  copy(h + i, values, count - i);
  if constexpr (kStep > 0) {
    float scales[kGroupFloats] = {}, shifts[kGroupFloats] = {};
    copy(scale + i, scales, count - i);
    copy(shift + i, shifts, count - i);
    group_at<A, kStep>(values, scales, shifts);
  } else {
    group_at<A, kStep>(values, scale, shift);
  }
  copy(values, h + i, count - i);
}

template <Activation A>
void run_planar(const Epilogue& p, int64_t begin, int64_t end) {
  const int64_t across = ceil_div(p.pixels, kPieceFloats);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = i / across, c = plane % p.c, first = i % across * kPieceFloats;
    float scale[kLanes], shift[kLanes];
    S::store(scale, S::broadcast(p.scale[c]));
    S::store(shift, S::broadcast(p.shift[c]));
    row<A, 0>(p.h + plane * p.pixels + first, min(kPieceFloats, p.pixels - first), scale, shift);
  }
}

template <Activation A>
void run_channels_last(const Epilogue& p, int64_t begin, int64_t end) {
  const int64_t each = pixels_in_piece(p);
  const int64_t last = min(end * each, p.n * p.pixels);
  for (int64_t pixel = begin * each; pixel < last; ++pixel) {
    row<A, kLanes>(p.h + pixel * p.c, p.c, p.scale, p.shift);
  }
}

void run(const Epilogue& p, Layout layout, int64_t begin, int64_t end) {
  with_activation(p.act, [&](auto a) __attribute__((always_inline)) {
    constexpr Activation kAct = static_cast<Activation>(decltype(a)::value);
    if (layout == Layout::planar) {
      run_planar<kAct>(p, begin, end);
    } else {
      run_channels_last<kAct>(p, begin, end);
    }
  });
}

}  // namespace

extern const EpilogueKernels epilogue_kernels;
const EpilogueKernels epilogue_kernels = {pieces, run};

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
