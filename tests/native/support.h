// What do the native tests share? Seeded random problems, exact-size memory, a failure to throw.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/activation.h"

namespace convmixer_fast_test {

struct Options {
  int64_t problems = 200;
  uint64_t seed = 1;
};

// Each returns a summary in one line; throws Failure with the problem that went wrong.
std::string test_kernels(const Options& options);
std::string test_threads(const Options& options);

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  out.precision(9);
  (out << ... << parts);
  return out.str();
}

// splitmix64 (Steele, Lea and Flood, 2014): the same problems with every compiler and library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  // From `low` to `high`, both included.
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return integer(1, 100) <= percent; }
  int64_t one_of(std::initializer_list<int64_t> values) {
    return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // Mean 0, variance 1, within 6: the sum of twelve uniform numbers, less 6.
  float normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return static_cast<float>(sum);
  }
  convmixer_fast::Activation activation() {
    return static_cast<convmixer_fast::Activation>(integer(0, convmixer_fast::kActivations - 1));
  }

 private:
  uint64_t state_;
};

// A vector of this size holds not one byte more: an address sanitizer sees the first beyond it.
using Floats = std::vector<float>;

inline Floats normals(Random& random, int64_t count, float factor = 1.0f) {
  Floats values(static_cast<std::size_t>(count));
  for (float& v : values) v = factor * random.normal();
  return values;
}

// BatchNorm's scales: around 1, some negative.
inline Floats scales(Random& random, int64_t count) {
  Floats values(static_cast<std::size_t>(count));
  for (float& v : values) v = (random.chance(20) ? -1.0f : 1.0f) * (0.5f + 1.5f * random.normal() / 6);
  return values;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// What an output holds before: a NaN that no arithmetic makes, so that it is known where it stays.
inline float untouched() {
  const uint32_t bits = 0x7FC0DEADu;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline Floats untouched_floats(int64_t count) {
  return Floats(static_cast<std::size_t>(count), untouched());
}

inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace convmixer_fast_test
