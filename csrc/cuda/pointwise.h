// The pointwise half of a ConvMixer block (its channel mixing) on an NVIDIA GPU: a matrix product with
// the rest of the half in its epilogue,
//
//   d[m,n] = scale[n] * act(bias[n] + sum_k a[m,k] * w[n,k]) + shift[n]
//
// m counts the pixels of a channels-last tensor, so a, w and d are row-major along the channels. Sums,
// bias, scale and shift are float32; d is rounded once.
//
// Everything is a raw pointer of the device that is current, and nothing waits: the caller chooses the
// device and the stream, and keeps the operands alive until the stream has passed. No torch header is
// needed here, no CUDA header either.
#pragma once

#include <cstdint>
#include <string>

#include "../common/activation.h"

namespace convmixer_fast::cuda {

// Of a, w and d. tf32: float32 in memory, multiplied as TF32.
enum class Type : int { bf16 = 0, fp16, tf32 };
inline constexpr const char* kTypeNames[] = {"bfloat16", "float16", "tf32"};
inline constexpr int kTypes = 3;

// At most this many outputs are few: 128 tiles of 128 x 128, under a wave on an A100 or H100. Every family
// takes smaller tiles for them. Counted in outputs, as the Python side counts them, which checks both
// forms of a kernel before their first use.
inline constexpr int64_t kFewOutputs = int64_t{128} * 128 * 128;

struct Pointwise {
  const void* a;       // [m][k], rows a_stride elements apart
  const void* w;       // [n][k], rows k elements apart
  const float* bias;   // [n], or null; scale and shift [n]
  const float* scale;
  const float* shift;
  void* d;             // [m][n], rows n elements apart
  int64_t m, n, k;
  int64_t a_stride;
  Type type;
  Activation act;
};

inline bool few_outputs(const Pointwise& p) { return p.n == 0 || p.m <= kFewOutputs / p.n; }

// One family of kernels, for some architectures.
struct Family {
  const char* name;                 // "mma.sync" or "wgmma"
  bool (*serves)(int capability);   // 10 * major + minor, as in sm_89
  // Why the family cannot take this problem at this capability, in a few words; "" when it can.
  std::string (*refusal)(const Pointwise&, int capability);
  // Queues the kernel on a stream (a cudaStream_t) of the current device. The reason why it could not be
  // queued, with the CUDA error's name, the kernel, the shape and the architecture in it; "" when it was.
  // m or n of 0 queues nothing.
  std::string (*launch)(const Pointwise&, int capability, void* stream);
};

const Family& mma_family();    // pointwise_mma.cu: sm_80 and later
const Family& wgmma_family();  // pointwise_wgmma.cu: sm_90; in builds that found CUTLASS

}  // namespace convmixer_fast::cuda
