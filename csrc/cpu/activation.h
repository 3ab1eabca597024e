// How is an activation computed on a vector? Exactly, in float32, without calls.
//
// Every function keeps what IEEE arithmetic gives PyTorch's formula: NaN stays NaN, relu(NaN) is
// NaN, gelu(+inf) = +inf, and gelu, silu and hardswish of -inf are NaN (-inf * 0).
// Sums are written a * b + c and compiled with -ffp-contract=fast, so that each is one rounding
// where the machine has a fused multiply-add.
#pragma once

#include "../activation_id.h"
#include "simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {

// 0.5 / q for q from 1 to infinity.
template <int L>
struct Half {
  template <class Float>
  static CMF_INLINE Float over(Float q) {
    return 0.5f / q;
  }
};
#if defined(__AVX512F__)
// 16 cycles of division are more than half of a GELU. The reciprocal to 14 bits and one step of Newton's
// method are 6 instructions; of infinity it is 0, where that step would be 0 * infinity.
template <>
struct Half<16> {
  static CMF_INLINE __m512 over(__m512 q) {
    const __m512 half = _mm512_set1_ps(0.5f) * _mm512_maskz_rcp14_ps(0xFFFF, q);
    const __m512 error = 1.0f - q * (half + half);
    const __mmask16 finite =
        _mm512_cmp_ps_mask(q, _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
    return _mm512_mask_fmadd_ps(half, finite, error, half);
  }
};
#endif

// GELU in its erf form, x * Phi(x) with Phi the normal distribution, of G vectors in step.
//
// Phi(-u) = 1 / (2 (1 + r(u))^8) for u = |x|, the form of Abramowitz and Stegun 7.1.28 with r a
// polynomial of degree 9, fitted so that u * Phi(-u) is right to 1.5e-8 and, on normal inputs, to 2e-11
// on average; Phi(x) is that or 1 minus that. No clamp: far out the power overflows to infinity and Phi
// is exactly 0 or 1.
//
// The power is kept without its 1, (1 + r)^2 - 1 = r^2 + 2 r: rounded with it, 8 times the error of
// 1 + r would reach Phi where r is small, and stay in the mean of maps whose pixels are alike.
// 13 operations of the multipliers, 5 additions, 1 selection, 1 division, which mostly has a unit of its
// own. Errors on [-9, 9]: at most 4.0e-7 (PyTorch's 3.8e-7, with AVX2), root mean square 5.8e-8 (9.0e-8);
// left of -1.5, where PyTorch's formula subtracts what is nearly equal, at most 3.8e-8. The chain of one
// vector is 90 cycles long: G vectors at a time fill them.
template <int L, int G>
static CMF_INLINE void gelu(typename Simd<L>::Float (&x)[G]) {
  using Float = typename Simd<L>::Float;
  using Int = typename Simd<L>::Int;
  constexpr float r[9] = {0x1.9884d8p-4f,  0x1.6ea6a0p-5f,  0x1.1cf352p-7f,
                          0x1.a75b88p-11f, 0x1.1dffe2p-12f, 0x1.45919cp-17f,
                          0x1.6cdbaap-17f, -0x1.c617d6p-20f, 0x1.5582bcp-22f};
  Float u[G], power[G];
  static_for<G>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    u[I] = reinterpret_cast<Float>(reinterpret_cast<Int>(x[I]) & 0x7fffffff);
    power[I] = u[I] * r[8] + r[7];
  });
  static_for<7>([&](auto i) __attribute__((always_inline)) {
    static_for<G>([&](auto g) __attribute__((always_inline)) {
      constexpr int I = decltype(g)::value;
      power[I] = power[I] * u[I] + r[6 - decltype(i)::value];
    });
  });
  static_for<G>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    power[I] = power[I] * u[I];
  });
  static_for<3>([&](auto) __attribute__((always_inline)) {
    static_for<G>([&](auto g) __attribute__((always_inline)) {
      constexpr int I = decltype(g)::value;
      power[I] = power[I] * power[I] + (power[I] + power[I]);
    });
  });
  static_for<G>([&](auto g) __attribute__((always_inline)) {
    constexpr int I = decltype(g)::value;
    const Float tail = Half<L>::over(power[I] + 1.0f);
    x[I] = x[I] * (x[I] < Float{} ? tail : 1.0f - tail);
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
