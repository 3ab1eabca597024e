// What becomes of a tile's sums? scale * act(sum + bias) + shift, one rounding, and stores of 16 bytes.
//
// A warp's sums lie as multiply_add leaves them: of each block of 16 x 8, lane l = 4 g + t holds columns
// 2 t and 2 t + 1 of rows g and g + 8. The four lanes of a quad hold one row of a block, 8 neighbours
// between them, and exchange until each has 16 bytes in one piece: no shared memory, no barrier.
#pragma once

#include "activation.cuh"

namespace convmixer_fast::cuda {

// What the kernel is told.
struct Operands {
  const uint8_t* a;
  const uint8_t* w;
  const float* bias;  // or null
  const float* scale;
  const float* shift;
  uint8_t* d;
  int64_t m;
  int n, k;
  uint32_t a_stride, w_stride;  // in copies
};

// Bias, scale and shift of one column.
struct Column {
  float bias, scale, shift;
};

CMF_DEVICE Column column_at(const Operands& p, int n) {
  return {load_or_zero(p.bias + n, p.bias != nullptr), p.scale[n], p.shift[n]};
}

template <Activation kAct>
CMF_DEVICE float finish(float sum, const Column& c) {
  return c.scale * activate<kAct>(sum + c.bias) + c.shift;
}

CMF_DEVICE void exchange(uint32_t& first, uint32_t& second, bool upper, int lanes) {
  const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? first : second, lanes);
  (upper ? first : second) = got;
}

template <Type kType>
CMF_DEVICE void store_element(uint8_t* to, float value, bool inside) {
  if constexpr (kType == Type::tf32) {
    store_32(to, bits_of(value), inside);
  } else {
    store_16(to, static_cast<uint16_t>(pack<kType>(value, 0.0f)), inside);
  }
}

// Lane t of each quad gives word q to lane q and gets it as word t.
CMF_DEVICE void transpose_in_quads(uint32_t (&word)[4], int t) {
  const bool odd = t & 1, high = t & 2;
  exchange(word[0], word[1], odd, 1);
  exchange(word[2], word[3], odd, 1);
  exchange(word[0], word[2], high, 2);
  exchange(word[1], word[3], high, 2);
}

// sums[i][j] is the block at row 16 i and column 8 j of the warp's part of the product, which begins at
// row m0 and column n0. kAligned: rows of d begin at multiples of 16 bytes.
template <Type kType, Activation kAct, bool kAligned, int kI, int kJ>
CMF_DEVICE void store_sums(const Operands& p, const float (&sums)[kI][kJ][4], int64_t m0, int n0,
                           int lane) {
  constexpr int kSize = kType == Type::tf32 ? 4 : 2;
  constexpr int kBlocks = kType == Type::tf32 ? 2 : 4;  // 16 bytes a lane: what one exchange moves
  static_assert(kJ % kBlocks == 0);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j0 = 0; j0 < kJ; j0 += kBlocks) {
    const int mine = n0 + 8 * j0 + 2 * t;
    Column column[kBlocks][2];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // Past the end the last column's, for sums that nobody stores.
        column[j][e] = column_at(p, min(mine + 8 * j + e, p.n - 1));
      }
    }
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t m = m0 + 16 * i + 8 * h + g;
        const bool inside = m < p.m;
        uint8_t* row = p.d + m * p.n * kSize;
        float value[kBlocks][2];
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            value[j][e] = finish<kAct>(sums[i][j0 + j][2 * h + e], column[j][e]);
          }
        }
        if constexpr (!kAligned) {
#pragma unroll
          for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int n = mine + 8 * j + e;
              store_element<kType>(row + n * kSize, value[j][e], inside && n < p.n);
            }
          }
        } else if constexpr (kType == Type::tf32) {
          uint32_t word[4] = {bits_of(value[0][0]), bits_of(value[0][1]), bits_of(value[1][0]),
                              bits_of(value[1][1])};
          exchange(word[0], word[2], t & 1, 1);
          exchange(word[1], word[3], t & 1, 1);
          const int n = n0 + 8 * (j0 + t % 2) + 4 * (t / 2);
          store_128(row + n * kSize, word, inside && n < p.n);
        } else {
          uint32_t word[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) word[j] = pack<kType>(value[j][0], value[j][1]);
          transpose_in_quads(word, t);
          const int n = n0 + 8 * (j0 + t);
          store_128(row + n * kSize, word, inside && n < p.n);
        }
      }
    }
  }
}

}  // namespace convmixer_fast::cuda
