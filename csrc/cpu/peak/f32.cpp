// The register-only float32 loop of one instruction set. Compiled once for each (simd.h).
//
// 12 independent accumulators: more than latency (4 cycles) times multiply-adds a cycle (2). They are
// variables, not an array: compilers keep an array that assembly touches in memory.
#include "cpu/peak/peak.h"
#include "cpu/simd.h"

namespace convmixer_fast::CONVMIXER_FAST_ISA {
namespace {

using S = Simd<kLanes>;
using Float = S::Float;

// Keeps the compiler from merging or dropping turns.
CMF_INLINE void opaque(Float& value) {
#if defined(__x86_64__) && !defined(CONVMIXER_FAST_WIDE)
  asm volatile("" : "+v"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

double peak(int64_t turns, float* sink) {
  const Float one = S::broadcast(1.0f + *sink * 0.0f);
  Float a = one, b = one, c = one, d = one, e = one, f = one;
  Float g = one, h = one, i = one, j = one, k = one, l = one;
  // The values stay near 1: no slow numbers, no infinities.
  const Float factor = one * 0.999f, term = one * 0.001f;
  CMF_ROLLED
  for (int64_t t = 0; t < turns; ++t) {
    a = a * factor + term;
    b = b * factor + term;
    c = c * factor + term;
    d = d * factor + term;
    e = e * factor + term;
    f = f * factor + term;
    g = g * factor + term;
    h = h * factor + term;
    i = i * factor + term;
    j = j * factor + term;
    k = k * factor + term;
    l = l * factor + term;
    opaque(a), opaque(b), opaque(c), opaque(d), opaque(e), opaque(f);
    opaque(g), opaque(h), opaque(i), opaque(j), opaque(k), opaque(l);
  }
  float lanes[kLanes];
  S::store(lanes, a + b + c + d + e + f + g + h + i + j + k + l);
  *sink = lanes[0];
  return 12.0 * kLanes * static_cast<double>(turns);
}

}  // namespace

extern const PeakKernel peak_kernels;
const PeakKernel peak_kernels = peak;

}  // namespace convmixer_fast::CONVMIXER_FAST_ISA
