#include "cpu/engine/fingerprint.h"

#include <algorithm>
#include <cstring>

namespace convmixer_fast {
namespace {

constexpr std::size_t kWord = 8;
constexpr std::size_t kChains = 8;
// A row shorter than a cache line is read in passing.
constexpr std::size_t kShortestRow = 64;

// The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every bit of h and v reaches all.
inline std::uint64_t mix(std::uint64_t h, std::uint64_t v) {
  h = (h ^ v) + 0x9E3779B97F4A7C15u;
  h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
  h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
  return h ^ (h >> 31);
}

// One step of a chain. For a given v a bijection of h and for a given h one of v, so that one
// changed word always changes the chain's result. The rotation brings the high bits down, which a
// multiplication alone never does.
inline void step(std::uint64_t& h, std::uint64_t v) {
  h = (h ^ v) * 0x9FB21C651E98DF25u;
  h = (h << 29) | (h >> 35);
}

inline std::uint64_t read(const unsigned char* p, std::size_t bytes) {
  std::uint64_t v = 0;
  std::memcpy(&v, p, bytes);
  return v;
}

// A chain waits for its last multiplication; eight of them take turns.
struct Chains {
  std::uint64_t h[kChains] = {1, 2, 3, 4, 5, 6, 7, 8};

  void whole(const unsigned char* p, std::size_t bytes) {
    std::size_t at = 0;
    for (; at + kChains * kWord <= bytes; at += kChains * kWord) {
      for (std::size_t c = 0; c < kChains; ++c) step(h[c], read(p + at + c * kWord, kWord));
    }
    for (std::size_t c = 0; at < bytes; at += kWord, ++c) {
      step(h[c], read(p + at, std::min(kWord, bytes - at)));
    }
  }

  // Samples begin at multiples of 4, so that one holds whole elements.
  void diagonal(const unsigned char* p, std::size_t bytes, std::size_t row) {
    const std::size_t rows = bytes / row, last = row - kWord;
    for (std::size_t r = 0, column = 0; r < rows; ++r, column += 4) {
      if (column >= row) column = 0;
      step(h[r % kChains], read(p + r * row + std::min(column, last), kWord));
    }
  }
};

}  // namespace

std::uint64_t fingerprint(const Piece* pieces, std::size_t count) {
  Chains chains;
  std::uint64_t sizes = count;
  for (std::size_t i = 0; i < count; ++i) {
    const auto* p = static_cast<const unsigned char*>(pieces[i].address);
    const std::size_t bytes = pieces[i].bytes, row = pieces[i].row;
    sizes = mix(sizes, bytes);
    if (bytes <= kWholeBytes || row < kShortestRow) {
      chains.whole(p, bytes);
    } else {
      chains.diagonal(p, bytes, row);
    }
  }
  for (const std::uint64_t h : chains.h) sizes = mix(sizes, h);
  return sizes;
}

}  // namespace convmixer_fast
