// Activations of vectors, float32, to about 1 unit in the last place and without calls.
//
// Every function keeps what IEEE arithmetic gives PyTorch's formula: NaN stays NaN, relu(NaN) is
// NaN, gelu(+inf) = +inf, and gelu, silu and hardswish of -inf are NaN (-inf * 0).
// Sums are written a * b + c and compiled with -ffp-contract=fast, so that each is one rounding
// where the machine has a fused multiply-add.
#pragma once

#include "common/activation.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {

// GELU in its erf form, x * Phi(x) with Phi the normal distribution, of G vectors in step.
//
// By the power of a polynomial: Phi(-u) = 1 / (2 (1 + r(u))^8) for u = |x|, the form of Abramowitz and
// Stegun 7.1.28 with r a polynomial of degree 9, fitted so that u * Phi(-u) is right to 1.5e-8 and, on normal
// inputs, to 2e-11 on average; Phi(x) is that or 1 minus that. No clamp: far out the power overflows to
// infinity and Phi is exactly 0 or 1.
//
// The power is kept without its 1, (1 + r)^2 - 1 = r^2 + 2 r: rounded with it, 8 times the error of
// 1 + r would reach Phi where r is small, and stay in the mean of maps whose pixels are alike.
// 13 operations of the multipliers, 5 additions, 1 selection, 1 division, which mostly has a unit of its
// own. Errors on [-9, 9]: at most 4.0e-7 (PyTorch's 3.8e-7, with AVX2), root mean square 5.8e-8 (9.0e-8);
// left of -1.5, where PyTorch's formula subtracts what is nearly equal, at most 3.8e-8. The chain of one
// vector is 90 cycles long: G vectors at a time fill them.
template <int L, int G>
static CMF_INLINE void gelu_by_power(typename Simd<L>::Float (&x)[G]) {
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
    const Float tail = 0.5f / (power[I] + 1.0f);
    x[I] = x[I] * (x[I] < Float{} ? tail : 1.0f - tail);
  });
}

// GELU of G vectors in step, by the fastest method of the instruction set.
template <int L>
struct Gelu {
  template <int G, class Float>
  static CMF_INLINE void of(Float (&x)[G]) {
    gelu_by_power<L, G>(x);
  }
};
#if defined(__AVX512F__)
// max(x, 0) - g(|x|) with g(u) = u Phi(-u), which has neither cancellation nor far reach: 32 polynomials of
// degree 4, each for a stretch of u of 25/128 about its middle, found by instructions that look 16 numbers
// up in 32. 6 operations of the multipliers, 5 of the adders, 5 of the permutation unit, where the power has
// 16 and 6, and a reciprocal: Zen 4, 2 threads, old and new in turns, 256/8 1.04-1.08x, 1024/20 1.02x, the
// depthwise half at 768 channels and k = 7 1.05-1.13x.
//
// g is right to 1.4e-8: each polynomial is the one of least largest error, its coefficients rounded from the
// highest down and those below fitted again. The first begins u / 2 exactly:
// small values keep their digits. From 5.96 on, where g is 7.6e-9, the last is 0, which times the infinity of
// -inf is NaN as it has to be. Errors on [-9, 9]: at most 2.4e-7, root mean square 4.8e-8; left of -1.5 at
// most 1.1e-8.
template <>
struct Gelu<16> {
  static constexpr float kStep = 25.0f / 128;
  alignas(64) static constexpr float kTable[5][32] = {
    {0.0f, 0x1.520f3p-4f, 0x1.166e06p-3f, 0x1.4ec022p-3f, 0x1.5bb97p-3f, 0x1.48c92ap-3f, 0x1.217f28p-3f,
      0x1.e062e6p-4f, 0x1.7a251p-4f, 0x1.1b9b1cp-4f, 0x1.967034p-5f, 0x1.16c67cp-5f, 0x1.6e8be6p-6f,
      0x1.ce6244p-7f, 0x1.17fea6p-7f, 0x1.45bb1ep-8f, 0x1.6c250ep-9f, 0x1.87515p-10f, 0x1.945314p-11f,
      0x1.91c0c2p-12f, 0x1.7ff506p-13f, 0x1.60fbccp-14f, 0x1.38306ap-15f, 0x1.09a622p-16f, 0x1.b2fee4p-18f,
      0x1.56b2ep-19f, 0x1.03cd1ep-20f, 0x1.7b11a8p-22f, 0x1.0a21ecp-23f, 0x1.67a096p-25f, 0x1.d3b1fp-27f,
      0.0f},
    {0x1.0p-1f, 0x1.626f6cp-2f, 0x1.a11246p-3f, 0x1.502ea2p-4f, -0x1.9571d2p-7f, -0x1.3d354cp-4f,
      -0x1.d5a1a4p-4f, -0x1.07063ap-3f, -0x1.ff3facp-4f, -0x1.c3675p-4f, -0x1.71cfdp-4f, -0x1.1c555cp-4f,
      -0x1.9d262ap-5f, -0x1.1ce3a4p-5f, -0x1.760734p-6f, -0x1.d47b5p-7f, -0x1.1858e2p-7f, -0x1.40fddp-8f,
      -0x1.5fedf6p-9f, -0x1.71be2ep-10f, -0x1.7475eap-11f, -0x1.67eb3ep-12f, -0x1.4dc47ep-13f,
      -0x1.29206ep-14f, -0x1.fbfb4ap-16f, -0x1.a11126p-17f, -0x1.48f3ep-18f, -0x1.f29514p-20f,
      -0x1.6b18dcp-21f, -0x1.fc498ep-23f, -0x1.55f84p-24f, 0.0f},
    {-0x1.98847ep-2f, -0x1.892752p-2f, -0x1.5da166p-2f, -0x1.1d0396p-2f, -0x1.a26358p-3f, -0x1.095524p-3f,
      -0x1.01b17ap-4f, -0x1.4fc886p-7f, 0x1.a9965ap-6f, 0x1.7bebb2p-5f, 0x1.b84632p-5f, 0x1.a92cdep-5f,
      0x1.6e27aep-5f, 0x1.21574ap-5f, 0x1.a9dac6p-6f, 0x1.2666dap-6f, 0x1.808772p-7f, 0x1.dc43b6p-8f,
      0x1.1871a8p-8f, 0x1.3aabb8p-9f, 0x1.50e95ep-10f, 0x1.589fecp-11f, 0x1.511aaep-12f, 0x1.3b942cp-13f,
      0x1.1aea4cp-14f, 0x1.e60a72p-16f, 0x1.903736p-17f, 0x1.3c05d2p-18f, 0x1.dec334p-20f, 0x1.5bfd14p-21f,
      0x1.e5898cp-23f, 0.0f},
    {0x1.cfaa82p-16f, 0x1.9c6cf2p-5f, 0x1.7a47dap-4f, 0x1.ea54f8p-4f, 0x1.093876p-3f, 0x1.f61a26p-4f,
      0x1.a57054p-4f, 0x1.3784bcp-4f, 0x1.87c624p-5f, 0x1.7555a6p-6f, 0x1.e275c4p-9f, -0x1.1b89c2p-7f,
      -0x1.e6b6dp-7f, -0x1.0cbedp-6f, -0x1.ec1a94p-7f, -0x1.902a8ep-7f, -0x1.299256p-7f, -0x1.9aee2ep-8f,
      -0x1.09db02p-8f, -0x1.4436bcp-9f, -0x1.762776p-10f, -0x1.99cc44p-11f, -0x1.aae958p-12f,
      -0x1.a7ba3ep-13f, -0x1.913b2p-14f, -0x1.6ad9a4p-15f, -0x1.39aa82p-16f, -0x1.0360bap-17f,
      -0x1.9a9a24p-19f, -0x1.373e6p-20f, -0x1.c4178ap-22f, 0.0f},
    {0x1.0f145cp-4f, 0x1.f1b9a6p-5f, 0x1.741c38p-5f, 0x1.890276p-6f, 0x1.4e8a48p-10f, -0x1.29000ap-6f,
      -0x1.fcfa7p-6f, -0x1.2a27e2p-5f, -0x1.1dd768p-5f, -0x1.d500ap-6f, -0x1.499bbep-6f, -0x1.7c4ac2p-7f,
      -0x1.2d070cp-8f, 0x1.0bd9dcp-12f, 0x1.84e2e2p-9f, 0x1.0520dcp-8f, 0x1.fec0c6p-9f, 0x1.a9225cp-9f,
      0x1.3d1006p-9f, 0x1.b1ea48p-10f, 0x1.140394p-10f, 0x1.49126ep-11f, 0x1.71a696p-12f, 0x1.88b7e2p-13f,
      0x1.8bb4e4p-14f, 0x1.7af588p-15f, 0x1.5982d2p-16f, 0x1.2c4dd6p-17f, 0x1.f22ffp-19f, 0x1.8ab7f8p-20f,
      0x1.2af454p-21f, 0.0f}};

  template <int G>
  static CMF_INLINE void of(__m512 (&x)[G]) {
    // Four at a time: their values and the table's fill the registers.
    static_for<(G + 3) / 4>([&](auto part) __attribute__((always_inline)) {
      constexpr int kFirst = 4 * decltype(part)::value, kCount = min(4, G - kFirst);
      __m512 t[kCount], sum[kCount];
      __m512i which[kCount];
      static_for<kCount>([&](auto g) __attribute__((always_inline)) {
        constexpr int I = decltype(g)::value;
        // 8 for all that is larger, and for infinity; NaN and -inf go on.
        const __m512 u = _mm512_abs_ps(Extreme<16>::min(_mm512_set1_ps(8.0f), x[kFirst + I]));
        const __m512 inside = Extreme<16>::min(_mm512_set1_ps(31 * kStep), u);
        // Adding 2^23 rounds to the nearest integer and leaves it in the low bits.
        const __m512 shifted = inside * (1 / kStep) + 8388608.0f;
        which[I] = _mm512_castps_si512(shifted);
        t[I] = u - (shifted - 8388608.0f) * kStep;
      });
      static_for<5>([&](auto d) __attribute__((always_inline)) {
        constexpr int D = 4 - decltype(d)::value;
        static_for<kCount>([&](auto g) __attribute__((always_inline)) {
          constexpr int I = decltype(g)::value;
          const __m512 c = _mm512_permutex2var_ps(_mm512_load_ps(kTable[D]), which[I],
                                                  _mm512_load_ps(kTable[D] + 16));
          sum[I] = D == 4 ? c : sum[I] * t[I] + c;
        });
      });
      static_for<kCount>([&](auto g) __attribute__((always_inline)) {
        constexpr int I = decltype(g)::value;
        x[kFirst + I] = Extreme<16>::max(__m512{}, x[kFirst + I]) - sum[I];
      });
    });
  }
};

// Two vectors of 8 as one of 16: a value does not depend on the width of its vector.
template <>
struct Gelu<8> {
  template <int G>
  static CMF_INLINE void of(__m256 (&x)[G]) {
    static_assert(G % 2 == 0, "vectors go in pairs");
    __m512 pairs[G / 2];
    static_for<G / 2>([&](auto g) __attribute__((always_inline)) {
      constexpr int I = decltype(g)::value;
      const __m512d low = _mm512_castps_pd(_mm512_castps256_ps512(x[2 * I]));
      pairs[I] = _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(x[2 * I + 1]), 1));
    });
    Gelu<16>::of(pairs);
    static_for<G / 2>([&](auto g) __attribute__((always_inline)) {
      constexpr int I = decltype(g)::value;
      x[2 * I] = _mm512_castps512_ps256(pairs[I]);
      x[2 * I + 1] = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(pairs[I]), 1));
    });
  }
};
#endif

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
    Gelu<L>::of(x);
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
