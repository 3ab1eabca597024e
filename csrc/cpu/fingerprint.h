// Has somebody written to this memory? A 64-bit hash of a few samples of each piece's contents.
//
// A piece of at most 128 bytes is read whole, a larger one at 16 places of 8 bytes spread evenly
// from its first byte to its last: a write that touches most of a tensor (an optimizer step, an
// average, a load) changes it, a write to a few elements may not. Sizes count, addresses do not.
// A sample costs a multiply and a few shifts; a cold one, its cache miss.
#pragma once

#include <cstddef>
#include <cstdint>

namespace convmixer_fast {

struct Piece {
  const void* address;
  std::size_t bytes;
};

std::uint64_t fingerprint(const Piece* pieces, std::size_t count);

}  // namespace convmixer_fast
