// Buffers: aligned to cache lines, large ones on huge pages.
//
// The GEMM streams through megabytes of weights once a tile: with pages of 4 KB the TLB misses alone cost
// several per cent.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace convmixer_fast {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Asks for huge pages for what lies inside [p, p + bytes): at once for memory not yet touched.
// Advice: where the system has none, nothing changes.
inline void advise_huge_pages(void* p, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(p) + kHugePage - 1) / kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(p) + bytes) / kHugePage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin * kHugePage), (end - begin) * kHugePage, MADV_HUGEPAGE);
  }
#else
  (void)p, (void)bytes;
#endif
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

// `count` floats, aligned to 64 bytes or, from two huge pages on, to a huge page; not initialised.
// Throws std::bad_alloc.
inline Floats aligned_floats(int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
  const std::size_t alignment = bytes < 2 * kHugePage ? 64 : kHugePage;
  void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) advise_huge_pages(p, bytes);
  return Floats(static_cast<float*>(p));
}

}  // namespace convmixer_fast
