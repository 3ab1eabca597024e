// How do sums become outputs? scale * act(sum) + shift on vectors in registers or in L1.
#pragma once

#include "activation.h"
#include "simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {

// Vectors that go through an activation in step.
constexpr int kGroup = 4;

// One group in place, each vector with its own scale and shift.
template <Activation A, int L>
static CMF_INLINE void finish_group(typename Simd<L>::Float (&group)[kGroup],
                                    const typename Simd<L>::Float (&scale)[kGroup],
                                    const typename Simd<L>::Float (&shift)[kGroup]) {
  activate<A, L, kGroup>(group);
  static_for<kGroup>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    group[I] = group[I] * scale[I] + shift[I];
  });
}

// Calls f(Index<A>) with the activation as a constant.
template <class F>
static CMF_INLINE void with_activation(Activation act, F&& f) {
  switch (act) {
    case Activation::gelu: return f(Index<static_cast<int>(Activation::gelu)>{});
    case Activation::relu: return f(Index<static_cast<int>(Activation::relu)>{});
    case Activation::silu: return f(Index<static_cast<int>(Activation::silu)>{});
    case Activation::hardswish: return f(Index<static_cast<int>(Activation::hardswish)>{});
    case Activation::identity: return f(Index<static_cast<int>(Activation::identity)>{});
  }
}

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
