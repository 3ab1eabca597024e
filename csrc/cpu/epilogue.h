// What all epilogues share: the activation as a constant, and how many vectors go through it in step.
#pragma once

#include "cpu/activation.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {

// Vectors that go through an activation in step: GELU's chain is 90 cycles long, and an AVX2 machine
// issues a vector of it in 7 to 14.
constexpr int kGroup = 8;

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
