// Vectors: GNU vector-extension types, one source for every width.
//
// Included only by the kernel sources, which are compiled once per instruction set with
//   CONVMIXER_FAST_ISA    the name of the set (baseline, avx2, avx512)
//   CONVMIXER_FAST_LANES  floats in its widest vector
//   CONVMIXER_FAST_WIDE   only by tests: AVX-512's shapes for a machine that lacks it
// Everything lives in a namespace of that name and nothing from the C++ library is used: an inline
// function or template shared between these objects would be merged by the linker, and the copy it
// keeps may hold instructions that the machine lacks.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(CONVMIXER_FAST_ISA) || !defined(CONVMIXER_FAST_LANES)
#error "kernel sources need CONVMIXER_FAST_ISA and CONVMIXER_FAST_LANES"
#endif

#define CMF_INLINE inline __attribute__((always_inline))

// Before a loop whose body is already long enough. Unrolled, the compiler keeps
// what the iterations share (broadcast taps) in more registers than there are, and spills.
#if defined(__clang__)
#define CMF_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define CMF_ROLLED _Pragma("GCC unroll 1")
#endif

namespace convmixer_fast::CONVMIXER_FAST_ISA {

constexpr int kLanes = CONVMIXER_FAST_LANES;
// Registers of that width: x86 has 16 before AVX-512; AVX-512 and NEON have 32.
#if defined(__AVX512F__) || defined(__aarch64__) || defined(CONVMIXER_FAST_WIDE)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Whether a vector is a whole cache line, so that a load from anywhere takes two of them.
#if defined(__AVX512F__) || defined(CONVMIXER_FAST_WIDE)
constexpr bool kWide = true;
#else
constexpr bool kWide = false;
#endif

// Vectors in a row of a packed panel, and the neighbouring pixels they are (panel_gemm.h).
constexpr int kVectors = kWide ? 4 : 2;
constexpr int kPanel = kVectors * kLanes;

// The smaller and the larger of two vectors: x86 has one instruction for what the ternary says,
// but compilers do not find it for vectors.
template <int L>
struct Extreme {
  template <class Float>
  static CMF_INLINE Float min(Float a, Float b) {
    return a < b ? a : b;
  }
  template <class Float>
  static CMF_INLINE Float max(Float a, Float b) {
    return a > b ? a : b;
  }
};
#if defined(__SSE__)
template <>
struct Extreme<4> {
  static CMF_INLINE __m128 min(__m128 a, __m128 b) { return _mm_min_ps(a, b); }
  static CMF_INLINE __m128 max(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
};
#endif
#if defined(__AVX__)
template <>
struct Extreme<8> {
  static CMF_INLINE __m256 min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
  static CMF_INLINE __m256 max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
};
#endif
#if defined(__AVX512F__)
template <>
struct Extreme<16> {
  // With all lanes on these are the plain instructions; GCC 12's headers warn at _mm512_min_ps.
  static CMF_INLINE __m512 min(__m512 a, __m512 b) { return _mm512_maskz_min_ps(0xFFFF, a, b); }
  static CMF_INLINE __m512 max(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xFFFF, a, b); }
};
#endif

// sum + a * b into sum.
template <int L>
struct Accumulate {
  template <class Float>
  static CMF_INLINE void add(Float& sum, Float a, Float b) {
    sum = a * b + sum;
  }
};
#if defined(__AVX512F__)
// GCC overwrites a factor as soon as it is not needed, and then moves sums from register to register:
// one instruction in six of a long loop. There is no choice in these. Both widths, so that narrow and
// wide tiles round alike in builds that fuse nothing, which sanitizers' are.
template <>
struct Accumulate<16> {
  static CMF_INLINE void add(__m512& sum, __m512 a, __m512 b) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};
template <>
struct Accumulate<8> {
  static CMF_INLINE void add(__m256& sum, __m256 a, __m256 b) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};
#endif

// The first lanes of a vector to memory: AVX-512 has an instruction for it.
template <int L>
struct First {
  template <class Float>
  static CMF_INLINE void store(float* p, Float v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
  }
};
#if defined(__AVX512F__)
template <>
struct First<16> {
  static CMF_INLINE void store(float* p, __m512 v, int64_t count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
  }
};
#endif

// To aligned memory past the caches, where the machine has such a store; others may read what was
// streamed after a call of streamed() and a barrier.
template <int L>
struct Stream {
  template <class Float>
  static CMF_INLINE void store(float* p, Float v) {
    *reinterpret_cast<Float*>(p) = v;
  }
};
#if defined(__SSE__)
template <>
struct Stream<4> {
  static CMF_INLINE void store(float* p, __m128 v) { _mm_stream_ps(p, v); }
};
#endif
#if defined(__AVX__)
template <>
struct Stream<8> {
  static CMF_INLINE void store(float* p, __m256 v) { _mm256_stream_ps(p, v); }
};
#endif
#if defined(__AVX512F__)
template <>
struct Stream<16> {
  static CMF_INLINE void store(float* p, __m512 v) { _mm512_stream_ps(p, v); }
};
#endif
static CMF_INLINE void streamed() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

template <int L>
struct Simd {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef int32_t Int __attribute__((vector_size(4 * L)));
  // The same vectors at any address that suits a float.
  typedef float Unaligned __attribute__((vector_size(4 * L), aligned(4), may_alias));

  static CMF_INLINE Float load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static CMF_INLINE void store(float* p, Float v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static CMF_INLINE void stream(float* p, Float v) { Stream<L>::store(p, v); }
  // Not s + Float{}: -0 + 0 is 0, so that compilers add where they could just copy.
  static CMF_INLINE Float broadcast(float s) { return s - Float{}; }

  // The first `count` of v's lanes, 0 to L of them.
  static CMF_INLINE void store_first(float* p, Float v, int64_t count) {
    First<L>::store(p, v, count);
  }

  static CMF_INLINE void accumulate(Float& sum, Float a, Float b) {
    Accumulate<L>::add(sum, a, b);
  }

  // a < b ? a : b and a > b ? a : b; where one is NaN, b.
  static CMF_INLINE Float min(Float a, Float b) { return Extreme<L>::min(a, b); }
  static CMF_INLINE Float max(Float a, Float b) { return Extreme<L>::max(a, b); }
};

// static_for<N>(f) calls f(Index<0>) ... f(Index<N-1>): array subscripts become constants before
// the compiler decides which arrays live in registers.
template <int I>
struct Index {
  static constexpr int value = I;
};

template <int N, int I = 0, class F>
static CMF_INLINE void static_for(F&& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    static_for<N, I + 1>(f);
  }
}

static CMF_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static CMF_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static CMF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static CMF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The length of equal pieces of at most `most`, rounded up to `unit`.
static CMF_INLINE int64_t even_pieces(int64_t length, int64_t most, int64_t unit) {
  return min(length, round_up(ceil_div(length, ceil_div(length, max(most, 1))), unit));
}

static CMF_INLINE void copy(const float* from, float* to, int64_t n) {
  using S = Simd<kLanes>;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) S::store(to + i, S::load(from + i));
#if defined(__AVX512F__)
  if (i == n) return;
  const __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1);
  _mm512_mask_storeu_ps(to + i, rest, _mm512_maskz_loadu_ps(rest, from + i));
#else
  for (; i < n; ++i) to[i] = from[i];
#endif
}

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
