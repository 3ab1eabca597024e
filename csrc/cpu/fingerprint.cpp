#include "fingerprint.h"

#include <cstring>

namespace convmixer_fast {
namespace {

constexpr std::size_t kSamples = 16;
constexpr std::size_t kSampleBytes = 8;
constexpr std::size_t kHashes = 4;

// The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every bit of h and v reaches all.
inline std::uint64_t mix(std::uint64_t h, std::uint64_t v) {
  h = (h ^ v) + 0x9E3779B97F4A7C15u;
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
  return h ^ (h >> 31);
}

inline std::uint64_t read(const unsigned char* p, std::size_t bytes) {
  std::uint64_t v = 0;
  std::memcpy(&v, p, bytes);
  return v;
}

}  // namespace

std::uint64_t fingerprint(const Piece* pieces, std::size_t count) {
  // A sample waits for the one before it, so that samples take turns with four hashes.
  std::uint64_t h[kHashes] = {count, 1, 2, 3};
  for (std::size_t i = 0; i < count; ++i) {
    const auto* p = static_cast<const unsigned char*>(pieces[i].address);
    const std::size_t bytes = pieces[i].bytes;
    auto take = [&](std::size_t s, std::size_t at, std::size_t n) {
      h[s % kHashes] = mix(h[s % kHashes], read(p + at, n));
    };
    h[0] = mix(h[0], bytes);
    if (bytes <= kSamples * kSampleBytes) {
      std::size_t s = 0;
      for (; (s + 1) * kSampleBytes <= bytes; ++s) take(s, s * kSampleBytes, kSampleBytes);
      if (s * kSampleBytes < bytes) take(s, s * kSampleBytes, bytes - s * kSampleBytes);
    } else {
      // Samples start at multiples of 4 so that none straddles two floats, but for the last: it
      // ends with the piece.
      const std::size_t last = bytes - kSampleBytes;
      for (std::size_t s = 0; s + 1 < kSamples; ++s) {
        take(s, last / (kSamples - 1) * s / 4 * 4, kSampleBytes);
      }
      take(kSamples - 1, last, kSampleBytes);
    }
  }
  return mix(mix(mix(h[0], h[1]), h[2]), h[3]);
}

}  // namespace convmixer_fast
