// How is an activation computed on a vector? Exactly, in float32, without calls.
//
// Every function keeps what IEEE arithmetic gives PyTorch's formula: NaN stays NaN, relu(NaN) is
// NaN, gelu(+inf) = +inf, and gelu, silu and hardswish of -inf are NaN (-inf * 0).
// Sums are written a * b + c and compiled with -ffp-contract=fast, so that each is one rounding
// where the machine has a fused multiply-add.
#pragma once

#include "activation_id.h"
#include "simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {

// GELU in its erf form, x * Phi(x) with Phi the normal distribution, of G vectors in step.
//
// Phi(x) - 1/2 is odd, so it is x * P(x^2); on |x| <= 5.4, x^2 is mapped to s in [-1, 1], where a
// polynomial of degree 14 is well conditioned in float32 (coefficients fall from 0.13 to 0.0003).
// Beyond 5.4, Phi is 0 or 1 within half a unit in the last place of 1: s stops at 1, where P
// overshoots a little, and the clamps make it exactly 0 or 1 on every machine.
// 22 operations, 15 of them multiply-adds, no division. Largest error on [-9, 9]: 6.6e-7 (root mean
// square 9e-8), of which rounding x * Phi is most. The chain of one vector is 70 cycles long: G
// vectors at a time fill them.
template <int L, int G>
static CMF_INLINE void gelu(typename Simd<L>::Float (&x)[G]) {
  using S = Simd<L>;
  using Float = typename S::Float;
  constexpr float kEnd = 5.4f;
  constexpr float p[15] = {
      0x1.0c240ap-3f,  -0x1.0b955ep-4f, 0x1.8d4e92p-5f,  -0x1.413318p-5f,  0x1.072324p-5f,
      -0x1.a57f6p-6f,  0x1.414724p-6f,  -0x1.cc36c8p-7f, 0x1.406abcp-7f,   -0x1.ade458p-8f,
      0x1.c2220ap-9f,  -0x1.5c0156p-10f, 0x1.17ceacp-10f, -0x1.00d728p-10f, 0x1.594890p-12f};
  const Float one = S::broadcast(1.0f), half = S::broadcast(0.5f);
  Float s[G], phi[G];
  static_for<G>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    s[I] = S::min(x[I] * x[I] * (2.0f / (kEnd * kEnd)) - 1.0f, one);
    phi[I] = s[I] * p[14] + p[13];
  });
  static_for<13>([&](auto i) __attribute__((always_inline)) {
    static_for<G>([&](auto g) __attribute__((always_inline)) {
      constexpr int I = decltype(g)::value;
      phi[I] = phi[I] * s[I] + p[12 - decltype(i)::value];
    });
  });
  static_for<G>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    phi[I] = S::max(S::min(phi[I] * x[I], half), -half);
    x[I] = x[I] * phi[I] + x[I] * 0.5f;
  });
}

// exp(x), to about 1 unit in the last place; 0 and +inf beyond the float range, NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its polynomial of degree 6 (Cephes' expf);
// 2^n in two factors, since n reaches 150 on either side and one factor holds 127.
template <int L>
static CMF_INLINE typename Simd<L>::Float exp(typename Simd<L>::Float x) {
  using Float = typename Simd<L>::Float;
  using Int = typename Simd<L>::Int;
  const Float lowest = Simd<L>::broadcast(-104.0f), highest = Simd<L>::broadcast(104.0f);
  const Float clamped = Simd<L>::min(highest, Simd<L>::max(lowest, x));
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  const Float shifted = clamped * 1.44269504088896341f + kRound;
  const Float n = shifted - kRound;
  Float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Float e = r * 1.9875691500e-4f + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * (r * r) + r;
  e = e + 1.0f;
  const Int bits = reinterpret_cast<Int>(shifted) - 0x4B400000;
  const Int first = bits >> 1, second = bits - first;
  const Int low = (first + 127) << 23, high = (second + 127) << 23;
  return e * reinterpret_cast<Float>(low) * reinterpret_cast<Float>(high);
}

// G vectors, in place.
template <Activation A, int L, int G>
static CMF_INLINE void activate(typename Simd<L>::Float (&x)[G]) {
  using S = Simd<L>;
  using Float = typename S::Float;
  if constexpr (A == Activation::gelu) {
    gelu<L, G>(x);
  } else {
    static_for<G>([&](auto g) __attribute__((always_inline)) {
      Float& v = x[decltype(g)::value];
      if constexpr (A == Activation::relu) {
        v = S::max(Float{}, v);
      } else if constexpr (A == Activation::silu) {
        v = v / (1.0f + exp<L>(-v));
      } else if constexpr (A == Activation::hardswish) {
        const Float gate = S::min(S::max(v + 3.0f, Float{}), S::broadcast(6.0f));
        v = v * gate / 6.0f;
      }
    });
  }
}

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
