// How does an NVIDIA GPU since sm_80 multiply d = a w^T without waiting for memory? The kernel of the
// mma.sync family.
//
// for each tile of kTileM x kTileN outputs, in groups that share operands in L2  (one block of threads)
//   for each step of 64 bytes along k                               (shared memory, kStages buffers)
//     for each 32 bytes of it                                       (registers, two sets)
//       warp tile += a [kWarpM][32 bytes] * w [kWarpN][32 bytes]^T  (mma.sync)
//   epilogue.cuh
//
// A step of a 128 x 128 tile moves (128 + 128) 64 bytes = 16 KiB to shared memory for 128 x 128 x 32
// multiply-adds of 16 bits (16 of TF32: the same bytes, half the sum). kStages - 1 steps are on their
// way at once, copied by cp.async without passing through registers. Four warps, two by two, each hold
// 64 x 64 sums in 128 registers a thread; 32 bytes of k are 8 ldmatrix.x4 for 32 mma. Their two sets
// take 64 registers more: one is loaded while the other is multiplied. Two blocks fit a multiprocessor
// by registers (below 256 a thread) and by shared memory, 2 kStages 16 KiB: 128 of 164 KiB at four
// stages, 96 of 100 at three.
//
// Rows past the end repeat the last row, for products that nobody stores: the copies need no predicate
// for them and read nothing new. k's own end is filled with zeros.
#pragma once

#include "epilogue.cuh"

namespace convmixer_fast::cuda {

constexpr int kThreads = 128;
constexpr int kStepBytes = 64;                   // of each row, along k
constexpr int kChunks = kStepBytes / 16;         // of 16 bytes, what one address of ldmatrix covers
constexpr int kRowsAtOnce = kThreads / kChunks;  // copied by all threads, one chunk each
constexpr int kGroupM = 8;                       // rows of tiles in a group

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
  static constexpr int kStep = kStepBytes / kSize;  // elements of k
  static constexpr int kStageBytes = (tile_m + tile_n) * kStepBytes;
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

// Where a chunk lies in a buffer of rows: eight rows' chunks of one number, which ldmatrix reads
// together, and eight chunks of two rows, which are written together, all lie in different banks.
CMF_DEVICE uint32_t swizzled(int row, int chunk) {
  return row * kStepBytes + (chunk ^ (row / 2 % kChunks)) * 16;
}

// Sixteen bytes in copies of kBytes, zeros from the element `left` on. Narrow copies of a warp go to 32
// different banks: lanes whose chunks lie 128 bytes apart begin with different words.
template <int kBytes, int kSize>
CMF_DEVICE void copy_chunk(Shared to, const uint8_t* from, int left, int lane) {
  if constexpr (kBytes == 2) {
    // Odd rows of 16-bit elements: no asynchronous copy is that narrow.
    const uint16_t* element = reinterpret_cast<const uint16_t*>(from);
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = load_or_zero_16(element + 2 * i, 2 * i < left) |
                load_or_zero_16(element + 2 * i + 1, 2 * i + 1 < left) << 16;
    }
    store_shared_128(to, word);
  } else {
#pragma unroll
    for (int i = 0; i < 16 / kBytes; ++i) {
      const int at = kBytes == 4 ? (i ^ lane / 8) * 4 : 0;
      copy_async<kBytes>(to + at, from + at, at / kSize < left);
    }
  }
}

template <class C, int kStages>
CMF_DEVICE void pointwise_tile(const Operands& p, uint8_t* buffers) {
  constexpr int kWarpM = C::kTileM / 2, kWarpN = C::kTileN / 2;
  constexpr int kI = kWarpM / 16, kJ = kWarpN / 8;
  constexpr int kRowsA = C::kTileM / kRowsAtOnce, kRowsW = C::kTileN / kRowsAtOnce;
  constexpr uint32_t kBufferA = C::kTileM * kStepBytes;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;

  const Place tile = place_of(blockIdx.x, static_cast<uint32_t>((p.m + C::kTileM - 1) / C::kTileM),
                              static_cast<uint32_t>((p.n + C::kTileN - 1) / C::kTileN));
  const int64_t m0 = static_cast<int64_t>(tile.m) * C::kTileM;
  const int n0 = static_cast<int>(tile.n) * C::kTileN;

  // Copies: this thread's chunk of every kRowsAtOnce-th row, its place counted in copies.
  const int row = thread / kChunks, chunk = thread % kChunks;
  const uint8_t* a = p.a + m0 * p.a_stride * C::kCopyBytes + chunk * 16;
  const uint8_t* w = p.w + static_cast<int64_t>(n0) * p.w_stride * C::kCopyBytes + chunk * 16;
  uint32_t a_row[kRowsA], w_row[kRowsW];
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) {
    const int64_t here = m0 + row + i * kRowsAtOnce;
    a_row[i] = static_cast<uint32_t>(min(here, p.m - 1) - m0) * p.a_stride;
  }
#pragma unroll
  for (int i = 0; i < kRowsW; ++i) {
    const int here = n0 + row + i * kRowsAtOnce;
    w_row[i] = static_cast<uint32_t>(min(here, p.n - 1) - n0) * p.w_stride;
  }
  const Shared base = shared_address(buffers);
  const Shared to = base + swizzled(row, chunk);
  int left = p.k - chunk * (16 / C::kSize);  // elements of k from this thread's chunk on
  auto copy_step = [&](uint32_t buffer) {
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const uint8_t* from = a + static_cast<uint64_t>(a_row[i]) * C::kCopyBytes;
      copy_chunk<C::kCopyBytes, C::kSize>(to + buffer + i * kRowsAtOnce * kStepBytes, from, left, lane);
    }
#pragma unroll
    for (int i = 0; i < kRowsW; ++i) {
      const uint8_t* from = w + static_cast<uint64_t>(w_row[i]) * C::kCopyBytes;
      copy_chunk<C::kCopyBytes, C::kSize>(to + buffer + kBufferA + i * kRowsAtOnce * kStepBytes, from,
                                          left, lane);
    }
    copy_commit();
    a += kStepBytes;
    w += kStepBytes;
    left -= C::kStep;
  };

  // Fragments: the rows whose addresses this lane passes to ldmatrix. Both orders give multiply_add its
  // registers: of a, rows before chunks; of w, chunks before rows.
  const int warp_m = warp / 2 * kWarpM, warp_n = warp % 2 * kWarpN;
  const uint32_t a_lane = swizzled(warp_m + lane % 16, lane / 16);
  const uint32_t w_lane = kBufferA + swizzled(warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t a_set[2][kI][4], w_set[2][kJ / 2][4];
  auto load_set = [&](int set, uint32_t buffer) {
    // The second half of a step is two chunks on: the swizzle makes that the other 32 bytes.
    const Shared a_at = base + buffer + (a_lane ^ (set * 32));
    const Shared w_at = base + buffer + (w_lane ^ (set * 32));
#pragma unroll
    for (int i = 0; i < kI; ++i) load_matrices(a_set[set][i], a_at + i * 16 * kStepBytes);
#pragma unroll
    for (int j = 0; j < kJ / 2; ++j) load_matrices(w_set[set][j], w_at + j * 16 * kStepBytes);
  };

  float sums[kI][kJ][4] = {};
  auto multiply_set = [&](int set) {
    if constexpr (C::kType == Type::tf32) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < kI; ++i) a_set[set][i][r] = round_to_tf32(a_set[set][i][r]);
#pragma unroll
        for (int j = 0; j < kJ / 2; ++j) w_set[set][j][r] = round_to_tf32(w_set[set][j][r]);
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
  auto next = [](uint32_t buffer) {
    return buffer + C::kStageBytes == kStages * C::kStageBytes ? 0u : buffer + C::kStageBytes;
  };

  const int steps = (p.k + C::kStep - 1) / C::kStep;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_step(i * C::kStageBytes);
  copy_wait<kStages - 2>();
  __syncthreads();
  load_set(0, 0);
  uint32_t reading = 0, writing = (kStages - 1) * C::kStageBytes;
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    load_set(1, reading);
    // Into the buffer that the last step was multiplied from: since the barrier nobody reads it. Past k
    // the copies are zeros, so that a wait always finds the groups it counts.
    copy_step(writing);
    multiply_set(0);
    // The next step's copies: this thread's are done, and beyond the barrier everybody's.
    copy_wait<kStages - 2>();
    __syncthreads();
    reading = next(reading);
    writing = next(writing);
    load_set(0, reading);
    multiply_set(1);
  }
  copy_wait<0>();
  store_sums<C::kType, C::kAct, C::kCopyBytes == 16>(p, sums, m0 + warp_m, n0 + warp_n, lane);
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
