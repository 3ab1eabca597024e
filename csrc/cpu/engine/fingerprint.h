// Detects writes to memory: a 64-bit hash of the contents of some pieces.
//
// A piece of at most kWholeBytes, or without rows, is hashed whole: one element written is seen. Of
// a larger one each row is sampled once, 8 bytes along the diagonal of the matrix (rows x row
// bytes): a write to most of the piece, to one row (an output channel, a depthwise filter) or to
// one column (an input channel) of at most 32 bits an element changes the hash, a write to single
// elements may not. Sizes count, addresses do not.
//
// Whole pieces cost a multiply for 8 bytes, eight chains at once; a sample, a multiply and a cache
// miss. All parameters of 1024/20: 0.8 MB of vectors and 41 thousand samples.
#pragma once

#include <cstddef>
#include <cstdint>

namespace convmixer_fast {

constexpr std::size_t kWholeBytes = 16 * 1024;

struct Piece {
  const void* address;
  std::size_t bytes;
  // Bytes of a row; 0 where the piece is one vector.
  std::size_t row;
};

std::uint64_t fingerprint(const Piece* pieces, std::size_t count);

}  // namespace convmixer_fast
