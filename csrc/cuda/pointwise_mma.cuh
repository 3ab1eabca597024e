// How does an NVIDIA GPU since sm_80 multiply d = a w^T without waiting for memory? The kernel of the
// mma.sync family.
//
// for each tile of kTileM x kTileN outputs, in groups that share operands in L2  (one block of threads)
//   for each step of kStepBytes along k                             (shared memory, kStages buffers)
//     for each 32 bytes of it that are the warp's                   (registers, two sets)
//       warp tile += a [64][32 bytes] * w [64][32 bytes]^T          (mma.sync)
//   where warps split k: their sums are added                       (shared memory)
//   epilogue.cuh
//
// Each of four warps holds 64 x 64 sums in 128 registers a thread; 32 bytes of k are 8 ldmatrix.x4 for
// 32 mma. Two sets of them take 64 registers more: one is loaded while the other is multiplied.
//
// 128 x 128 outputs: the warps stand two by two, and all take the same 64 bytes of k in a step. 64 x 64
// outputs: the warps stand on the same outputs, and each takes its own 32 of the 128 bytes of a step. Four
// times as many blocks then keep the whole multiprocessor's tensor cores, and what a warp loads for an mma
// stays what it is in large tiles, where four warps of 32 x 32 would load twice as much.
//
// Either step moves 16 KiB to shared memory. kStages - 1 steps are on their way at once, copied by
// cp.async without passing through registers. Two blocks fit a multiprocessor by registers (below 256 a
// thread) and by shared memory, 2 kStages 16 KiB: 128 of 164 KiB at four stages, 96 of 100 at three.
//
// Rows past the end repeat the last row, for products that nobody stores: the copies need no predicate
// for them and read nothing new. k's own end is filled with zeros.
#pragma once

#include "epilogue.cuh"

namespace convmixer_fast::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpTile = 64;  // rows and columns of sums that a warp holds
constexpr int kSetBytes = 32;  // of each row, along k: what one mma multiplies
constexpr int kGroupM = 8;     // rows of tiles in a group

// Three buffers where a multiprocessor has 100 KiB of shared memory, for two blocks; four where it has
// 164 and more. architecture: 10 * major + minor.
__host__ __device__ constexpr int stages_for(int architecture) {
  return architecture == 86 || architecture == 88 || architecture == 89 || architecture >= 120 ? 3 : 4;
}

// kCopyBytes: 16 where all rows begin at multiples of 16 bytes (and hold whole pieces of 16), 4 or the
// element's 2 elsewhere.
template <Type type, Activation act, int copy_bytes, int tile_m, int tile_n>
struct Config {
  static constexpr Type kType = type;
  static constexpr Activation kAct = act;
  static constexpr int kCopyBytes = copy_bytes;
  static constexpr int kTileM = tile_m, kTileN = tile_n;
  static constexpr int kSize = type == Type::tf32 ? 4 : 2;
  // Warps that share their outputs and split k.
  static constexpr int kSplit = kWarps * kWarpTile * kWarpTile / (tile_m * tile_n);
  static_assert(kSplit == 1 || kSplit == kWarps);
  static constexpr int kSets = kSplit == 1 ? 2 : 1;  // a warp's, of a step
  static constexpr int kStepBytes = kSetBytes * kSets * kSplit;
  static constexpr int kStep = kStepBytes / kSize;  // elements of k
  static constexpr int kStageBytes = (tile_m + tile_n) * kStepBytes;
  static constexpr int kChunks = kStepBytes / 16;         // what one address of ldmatrix covers
  static constexpr int kRowsAtOnce = kThreads / kChunks;  // copied by all threads
  // Copies of a row by one thread, in a step: a chunk, or a word of each 32 bytes. Eight threads then ask
  // for 32 bytes in one piece, what memory gives for any byte of them.
  static constexpr int kCopies = copy_bytes == 16 ? 1 : kStepBytes / 32;
  static_assert(copy_bytes == 16 || kChunks == 8);
};

// Row and column of a block's tile: column by column within groups of kGroupM rows. Blocks that run side
// by side then read few different rows of either operand: P = kGroupM^2 of them 2 kGroupM tile rows, in
// plain order P + 1.
struct Place {
  uint32_t m, n;
};
CMF_DEVICE Place place_of(uint32_t block, uint32_t tiles_m, uint32_t tiles_n) {
  const uint32_t group = block / (kGroupM * tiles_n), inside = block % (kGroupM * tiles_n);
  const uint32_t first = group * kGroupM, left = tiles_m - first;
  const uint32_t height = left < kGroupM ? left : kGroupM;
  return {first + inside % height, inside / height};
}

// Where a chunk lies in a buffer of rows of kChunks chunks. What is read or written together lies in
// different banks: eight rows' chunks of one number, by ldmatrix; eight chunks of one or two rows; and of
// four rows of 128 bytes that begin at a multiple of four, 32 bytes each, by narrow copies.
template <int kChunks>
CMF_DEVICE uint32_t swizzled(int row, int chunk) {
  static_assert(kChunks == 4 || kChunks == 8);
  const int turned = kChunks == 4 ? row / 2 % 4 : row % 4 * 2 + row / 4 % 2;
  return row * kChunks * 16 + (chunk ^ turned) * 16;
}

// A row's copies by one thread, zeros from the element `left` on: to[i] gets what lies 32 i bytes on.
template <class C>
CMF_DEVICE void copy_row(const Shared (&to)[C::kCopies], uint32_t offset, const uint8_t* from, int left) {
  if constexpr (C::kCopyBytes == 2) {
    // Odd rows of 16-bit elements: no asynchronous copy is that narrow.
    const uint16_t* element = reinterpret_cast<const uint16_t*>(from);
    uint32_t word[C::kCopies];
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) {
      word[i] = load_or_zero_16(element + 16 * i, 16 * i < left) |
                load_or_zero_16(element + 16 * i + 1, 16 * i + 1 < left) << 16;
    }
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) store_shared_32(to[i] + offset, word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) {
      copy_async<C::kCopyBytes>(to[i] + offset, from + 32 * i, 32 * i / C::kSize < left);
    }
  }
}

// A float32 for multiply_add, which takes the upper 19 bits for a TF32 number and cuts the rest off. (PTX
// does not say so, but nvcc relies on it: its rounding clears those bits, unless the result is multiplied.)
// Alone that is wrong by up to 1 unit of the last place kept (ulp), and always towards zero. If c ulp are
// added before to a number whose fraction is 1, and so nearly 2 c to one of nearly 2, with c = ln(2) / 2,
// it is wrong by less than 2 c = 0.694 ulp (rounding to the nearest: 0.5), and on average by nothing where
// logarithms spread evenly. TF32 numbers stay as they are, for less than 1 ulp is added; so do signs and
// infinity, and NaN stays NaN, also 0x7fffffff, of which adding half an ulp as an integer makes -0. Finite
// numbers become infinity from 0.31 ulp above the largest TF32 number on (rounding: 0.5). Below the normal
// range the error is below 1 ulp, 2^-136. One instruction a word, where rounding takes two.
CMF_DEVICE uint32_t prepared_for_tf32(uint32_t bits, const Operands& p) {
  return multiplied_in_place(bits, 1.0f + 0.34657359f / 1024, p.n > 0);
}

// Two warps, whose numbers differ in one bit, hold sums of the same outputs over different parts of k: each
// gets the whole sums of one half, by rows or columns of blocks, and gives what it has of the other. `room`
// has place for a half of each warp's sums, and nobody uses it any more.
template <int kI, int kJ, int kHalfI, int kHalfJ>
CMF_DEVICE void add_by_halves(const float (&sums)[kI][kJ][4], float (&half)[kHalfI][kHalfJ][4],
                              Shared room, int bit, int warp, int lane) {
  static_assert(kHalfI * kHalfJ * 2 == kI * kJ);
  constexpr int kBlockBytes = 32 * 16;
  const bool second = warp & bit;
  const Shared mine = room + lane * 16 + warp * (kHalfI * kHalfJ * kBlockBytes);
#pragma unroll
  for (int i = 0; i < kHalfI; ++i) {
#pragma unroll
    for (int j = 0; j < kHalfJ; ++j) {
      const float(&low)[4] = sums[i][j];
      const float(&high)[4] = sums[kI - kHalfI + i][kJ - kHalfJ + j];
      uint32_t given[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        given[e] = bits_of(either(second, low[e], high[e]));
        half[i][j][e] = either(second, high[e], low[e]);
      }
      store_shared_128(mine + (i * kHalfJ + j) * kBlockBytes, given);
    }
  }
  __syncthreads();
  const Shared theirs = room + lane * 16 + (warp ^ bit) * (kHalfI * kHalfJ * kBlockBytes);
#pragma unroll
  for (int i = 0; i < kHalfI; ++i) {
#pragma unroll
    for (int j = 0; j < kHalfJ; ++j) {
      uint32_t got[4];
      load_shared_128(got, theirs + (i * kHalfJ + j) * kBlockBytes);
#pragma unroll
      for (int e = 0; e < 4; ++e) half[i][j][e] += float_of(got[e]);
    }
  }
}

template <class C, int kStages>
CMF_DEVICE void pointwise_tile(const Operands& p, uint8_t* buffers) {
  constexpr int kI = kWarpTile / 16, kJ = kWarpTile / 8;
  constexpr int kRowsA = C::kTileM / C::kRowsAtOnce, kRowsW = C::kTileN / C::kRowsAtOnce;
  constexpr uint32_t kBufferA = C::kTileM * C::kStepBytes;
  constexpr uint32_t kRowsBytes = C::kRowsAtOnce * C::kStepBytes;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;

  const Place tile = place_of(blockIdx.x, static_cast<uint32_t>((p.m + C::kTileM - 1) / C::kTileM),
                              static_cast<uint32_t>((p.n + C::kTileN - 1) / C::kTileN));
  const int64_t m0 = static_cast<int64_t>(tile.m) * C::kTileM;
  const int n0 = static_cast<int>(tile.n) * C::kTileN;

  // Copies: this thread's column, of chunks or words, in every kRowsAtOnce-th row.
  constexpr int kColumnBytes = C::kCopyBytes == 16 ? 16 : 4;
  const int row = thread / C::kChunks, column = thread % C::kChunks;
  const uint8_t* a[kRowsA];
  const uint8_t* w[kRowsW];
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    const int64_t here = m0 + row + i * C::kRowsAtOnce;
    a[i] = p.a + min(here, p.m - 1) * p.a_stride * C::kCopyBytes + column * kColumnBytes;
  }
#pragma unroll
  for (int i = 0; i < kRowsW; ++i) {
    const int here = n0 + row + i * C::kRowsAtOnce;
    w[i] = p.w + static_cast<int64_t>(min(here, p.n - 1)) * p.w_stride * C::kCopyBytes +
           column * kColumnBytes;
  }
  const Shared base = shared_address(buffers);
  Shared to[C::kCopies];
#pragma unroll
  for (int i = 0; i < C::kCopies; ++i) {
    const int at = column * kColumnBytes + i * 32;
    to[i] = base + swizzled<C::kChunks>(row, at / 16) + at % 16;
  }
  int left = p.k - column * (kColumnBytes / C::kSize);  // elements of k from this thread's column on
  // The step that is `ahead` steps on from where a, w and left are.
  auto copy_step = [&](uint32_t buffer, int ahead) {
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      copy_row<C>(to, buffer + i * kRowsBytes, a[i] + ahead * C::kStepBytes, left - ahead * C::kStep);
    }
#pragma unroll
    for (int i = 0; i < kRowsW; ++i) {
      copy_row<C>(to, buffer + kBufferA + i * kRowsBytes, w[i] + ahead * C::kStepBytes,
                  left - ahead * C::kStep);
    }
    copy_commit();
  };
  auto advance = [&](int steps) {
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) a[i] += steps * C::kStepBytes;
#pragma unroll
    for (int i = 0; i < kRowsW; ++i) w[i] += steps * C::kStepBytes;
    left -= steps * C::kStep;
  };

  // Fragments: the rows whose addresses this lane passes to ldmatrix. Both orders give multiply_add its
  // registers: of a, rows before chunks; of w, chunks before rows.
  const int warp_m = C::kSplit == 1 ? warp / 2 * kWarpTile : 0;
  const int warp_n = C::kSplit == 1 ? warp % 2 * kWarpTile : 0;
  const int warp_k = C::kSplit == 1 ? 0 : warp * (kSetBytes / 16);  // in chunks
  const uint32_t a_lane = swizzled<C::kChunks>(warp_m + lane % 16, warp_k + lane / 16);
  const uint32_t w_lane =
      kBufferA + swizzled<C::kChunks>(warp_n + lane % 8 + lane / 16 * 8, warp_k + lane / 8 % 2);
  uint32_t a_set[2][kI][4], w_set[2][kJ / 2][4];
  auto load_set = [&](int set, uint32_t buffer) {
    // The second set of a step is two chunks on: the swizzle makes that the other 32 bytes.
    const uint32_t on = C::kSets == 2 ? set * kSetBytes : 0;
    const Shared a_at = base + buffer + (a_lane ^ on);
    const Shared w_at = base + buffer + (w_lane ^ on);
#pragma unroll
    for (int i = 0; i < kI; ++i) load_matrices(a_set[set][i], a_at + i * 16 * C::kStepBytes);
#pragma unroll
    for (int j = 0; j < kJ / 2; ++j) load_matrices(w_set[set][j], w_at + j * 16 * C::kStepBytes);
  };

  float sums[kI][kJ][4] = {};
  auto multiply_set = [&](int set) {
    if constexpr (C::kType == Type::tf32) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < kI; ++i) a_set[set][i][r] = prepared_for_tf32(a_set[set][i][r], p);
#pragma unroll
        for (int j = 0; j < kJ / 2; ++j) w_set[set][j][r] = prepared_for_tf32(w_set[set][j][r], p);
      }
    }
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
      for (int j = 0; j < kJ; ++j) {
        const uint32_t(&pair)[4] = w_set[set][j / 2];
        multiply_add<C::kType>(sums[i][j], a_set[set][i], pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
      }
    }
  };

  constexpr int kStepsAtOnce = 2 / C::kSets;  // what two sets are
  const int steps = (p.k + C::kStep - 1) / C::kStep;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_step(i * C::kStageBytes, i);
  advance(kStages - 1);
  copy_wait<kStages - 2>();
  __syncthreads();
  load_set(0, 0);
  uint32_t reading = 0, writing = (kStages - 1) * C::kStageBytes;
  auto next_step = [&] {
    // The next step's copies: this thread's are done, and beyond the barrier everybody's.
    copy_wait<kStages - 2>();
    __syncthreads();
    // Copies then go to the buffer that the last step was multiplied from: nobody reads it any more.
    writing = reading;
    reading = reading + C::kStageBytes == kStages * C::kStageBytes ? 0u : reading + C::kStageBytes;
  };
#pragma unroll 1
  for (int i = 0; i < steps; i += kStepsAtOnce) {
    // Past k the copies are zeros, so that a wait always finds the groups it counts.
    if constexpr (C::kSets == 1) {
      copy_step(writing, 0);
      next_step();
      load_set(1, reading);
      multiply_set(0);
      copy_step(writing, 1);
    } else {
      load_set(1, reading);
      copy_step(writing, 0);
      multiply_set(0);
    }
    advance(kStepsAtOnce);
    next_step();
    load_set(0, reading);
    multiply_set(1);
  }
  copy_wait<0>();
  if constexpr (C::kSplit == 1) {
    store_sums<C::kType, C::kAct, C::kCopyBytes == 16>(p, sums, m0 + warp_m, n0 + warp_n, lane);
  } else {
    // Until everybody has read its last step, and nothing is on its way to the buffers.
    __syncthreads();
    constexpr int kHalfBytes = kWarpTile * kWarpTile / 2 * static_cast<int>(sizeof(float));
    static_assert(kWarps * (kHalfBytes + kHalfBytes / 2) <= kStages * C::kStageBytes);
    float half[kI / 2][kJ][4], quarter[kI / 2][kJ / 2][4];
    add_by_halves(sums, half, base, 2, warp, lane);
    add_by_halves(half, quarter, base + kWarps * kHalfBytes, 1, warp, lane);
    store_sums<C::kType, C::kAct, C::kCopyBytes == 16>(p, quarter, m0 + warp / 2 * (kWarpTile / 2),
                                                       n0 + warp % 2 * (kWarpTile / 2), lane);
  }
}

// As in pointwise.h, rows of a and w a_stride and w_stride copies of C::kCopyBytes apart.
template <class C>
__global__ void __launch_bounds__(kThreads, 2)
    pointwise_mma(const uint8_t* a, const uint8_t* w, const float* bias, const float* scale,
                  const float* shift, uint8_t* d, int64_t m, int n, int k, uint32_t a_stride,
                  uint32_t w_stride) {
  CMF_DYNAMIC_SHARED(buffers);
  const Operands p{a, w, bias, scale, shift, d, m, n, k, a_stride, w_stride};
#ifdef __CUDA_ARCH__
  pointwise_tile<C, stages_for(__CUDA_ARCH__ / 10)>(p, buffers);
#endif
}

}  // namespace convmixer_fast::cuda
