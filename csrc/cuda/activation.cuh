// How is an activation computed on a GPU? In float32, without calls or branches.
//
// What IEEE arithmetic gives PyTorch's formula is kept: NaN stays NaN, relu(NaN) is NaN,
// gelu(+inf) = +inf, and gelu, silu and hardswish of -inf are NaN (-inf * 0).
#pragma once

#include "ptx.cuh"

namespace convmixer_fast::cuda {

// GELU in its erf form, h * Phi(h) with Phi the normal distribution.
//
// Phi(-u) = 2^q(u) for u = |h|, q a polynomial of degree 8 fitted so that u * Phi(-u) is right to 7e-9;
// Phi(h) is that or 1 minus that. No clamp: q falls without end, and far out Phi is exactly 0 or 1.
// 8 multiply-adds, one ex2 and three more, where erff takes 24 and a branch. Errors on [-12, 12]: at
// most 3.9e-7 (PyTorch's erf form: 3.7e-7), left of -1.5 at most 4.0e-8 (2.6e-7), with an exact ex2; the
// machine's two units in the last place are 3e-8 more at most.
CMF_DEVICE float gelu(float h) {
  const float u = fabsf(h);
  float q = u * -1.690397994e-06f + 2.508325997e-05f;
  q = q * u - 1.144624184e-04f;
  q = q * u - 3.233428579e-04f;
  q = q * u + 7.333385292e-03f;
  q = q * u - 5.271419883e-02f;
  q = q * u - 4.591154456e-01f;
  q = q * u - 1.151123285e+00f;
  q = q * u - 9.999988739e-01f;
  const float tail = exp2_approximate(q);
  return h * (h < 0.0f ? tail : 1.0f - tail);
}

template <Activation kAct>
CMF_DEVICE float activate(float h) {
  if constexpr (kAct == Activation::gelu) {
    return gelu(h);
  } else if constexpr (kAct == Activation::relu) {
    return h < 0.0f ? 0.0f : h;  // fmaxf would make 0 of NaN
  } else if constexpr (kAct == Activation::silu) {
    // exp(-h) as 2^(-h log2 e).
    return h * reciprocal_approximate(1.0f + exp2_approximate(h * -1.4426950408889634f));
  } else if constexpr (kAct == Activation::hardswish) {
    // The factor h keeps NaN where fminf and fmaxf lose it.
    return h * fminf(fmaxf(h + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
  } else {
    static_assert(kAct == Activation::identity);
    return h;
  }
}

}  // namespace convmixer_fast::cuda
