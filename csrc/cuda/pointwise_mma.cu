// Which kernel of the mma.sync family takes a problem, and how is it launched?
//
// Kernels are compiled for each type and activation, in four ways (Way). The three types by five
// activations by four ways, less the way that float32 has no use for, are 55 kernels.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "pointwise_mma.cuh"
#include "status.h"

namespace convmixer_fast::cuda {
namespace {

// Large tiles, small ones where large would leave multiprocessors idle, and tiles for rows that do not
// begin at multiples of 16 bytes: of 4, or of an element.
enum class Way { large, small, by_4, by_2 };

struct Variant {
  void (*kernel)(const uint8_t*, const uint8_t*, const float*, const float*, const float*, uint8_t*,
                 int64_t, int, int, uint32_t, uint32_t) = nullptr;
  int copy_bytes = 0, tile_m = 0, tile_n = 0, stage_bytes = 0;
};

template <Type kType, Activation kAct, Way kWay>
Variant variant() {
  constexpr int kCopy = kWay == Way::by_4 ? 4 : kWay == Way::by_2 ? 2 : 16;
  constexpr int kTile = kWay == Way::large ? 128 : 64;
  using C = Config<kType, kAct, kCopy, kTile, kTile>;
  return {pointwise_mma<C>, kCopy, kTile, kTile, C::kStageBytes};
}

template <Type kType, Activation kAct>
Variant variant(Way way) {
  switch (way) {
    case Way::large: return variant<kType, kAct, Way::large>();
    case Way::small: return variant<kType, kAct, Way::small>();
    case Way::by_4: return variant<kType, kAct, Way::by_4>();
    case Way::by_2:
      if constexpr (kType != Type::tf32) return variant<kType, kAct, Way::by_2>();
  }
  return {};
}

template <Type kType>
Variant variant(Activation act, Way way) {
  switch (act) {
    case Activation::gelu: return variant<kType, Activation::gelu>(way);
    case Activation::relu: return variant<kType, Activation::relu>(way);
    case Activation::silu: return variant<kType, Activation::silu>(way);
    case Activation::hardswish: return variant<kType, Activation::hardswish>(way);
    case Activation::identity: return variant<kType, Activation::identity>(way);
  }
  return {};
}

Variant variant(Type type, Activation act, Way way) {
  switch (type) {
    case Type::bf16: return variant<Type::bf16>(act, way);
    case Type::fp16: return variant<Type::fp16>(act, way);
    case Type::tf32: return variant<Type::tf32>(act, way);
  }
  return {};
}

int64_t size_of(Type type) { return type == Type::tf32 ? 4 : 2; }

// With one row its distance to the next means nothing.
int64_t a_stride(const Pointwise& p) { return p.m > 1 ? p.a_stride : p.k; }

// Whether rows of a and w can be copied, and rows of d stored, in pieces of `bytes`.
bool divisible(const Pointwise& p, int64_t bytes) {
  const auto addresses = reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.w);
  const int64_t size = size_of(p.type);
  if (addresses % bytes != 0 || p.k * size % bytes != 0 || a_stride(p) * size % bytes != 0) return false;
  return bytes < 16 || (reinterpret_cast<uintptr_t>(p.d) % 16 == 0 && p.n * size % 16 == 0);
}

int64_t tiles(const Pointwise& p, int64_t tile_m, int64_t tile_n) {
  const int64_t m = p.m / tile_m + (p.m % tile_m != 0), n = p.n / tile_n + (p.n % tile_n != 0);
  return m > std::numeric_limits<int64_t>::max() / n ? std::numeric_limits<int64_t>::max() : m * n;
}

// Where outputs are few, small tiles spread over four times as many blocks, which outweighs the half of a
// multiply-add a byte that they lose: an A100 holds 216 large tiles at once, an RTX 4090 256.
Way way_for(const Pointwise& p) {
  if (divisible(p, 16)) return few_outputs(p) ? Way::small : Way::large;
  return divisible(p, 4) ? Way::by_4 : Way::by_2;
}

std::string name_of(const Variant& v) {
  return "pointwise_mma " + std::to_string(v.tile_m) + "x" + std::to_string(v.tile_n) + ", copies of " +
         std::to_string(v.copy_bytes) + " bytes";
}

bool serves(int capability) { return capability >= 80; }

std::string refusal(const Pointwise& p, int capability) {
  if (!serves(capability)) return "mma.sync kernels need sm_80 or later";
  if (p.m < 0 || p.n < 0 || p.k < 0) return "a size is negative";
  if (p.m == 0 || p.n == 0) return "";
  constexpr int64_t kInt = std::numeric_limits<int>::max();
  // Less a tile, so that no column's or element's number passes it.
  if (p.n > kInt - 256 || p.k > kInt - 256) return "more than 2^31 - 257 channels";
  if (a_stride(p) < 0) return "rows of a lie backwards";
  const Variant v = variant(p.type, p.act, way_for(p));
  // Passed to the kernel in 32 bits, counted in copies.
  const int64_t apart = a_stride(p) / (v.copy_bytes / size_of(p.type));
  if (apart > std::numeric_limits<uint32_t>::max()) {
    return "rows of a lie 2^32 copies of " + std::to_string(v.copy_bytes) + " bytes apart or more";
  }
  if (tiles(p, v.tile_m, v.tile_n) > kInt) return "more than 2^31 - 1 tiles";
  return "";
}

// Bytes of shared memory that a kernel takes on the current device, allowed to it there. As many stages
// as it was compiled with: the device may run code for an older architecture, and the runtime knows for
// which (ptxVersion is what __CUDA_ARCH__ / 10 was). Asked once for each device and kernel.
cudaError_t prepare(const Variant& v, int* shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> prepared;
  const void* kernel = reinterpret_cast<const void*>(v.kernel);
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = prepared.find({device, kernel}); found != prepared.end()) {
    *shared_bytes = found->second;
    return cudaSuccess;
  }
  cudaFuncAttributes attributes;
  if (const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel); status != cudaSuccess) {
    return status;
  }
  *shared_bytes = stages_for(attributes.ptxVersion) * v.stage_bytes;
  if (const cudaError_t status =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, *shared_bytes);
      status != cudaSuccess) {
    return status;
  }
  prepared[{device, kernel}] = *shared_bytes;
  return cudaSuccess;
}

std::string launch(const Pointwise& p, int capability, void* stream) {
  if (const std::string why = refusal(p, capability); !why.empty()) {
    return "pointwise_mma (" + describe(p) + ", sm_" + std::to_string(capability) + "): " + why;
  }
  if (p.m == 0 || p.n == 0) return "";
  const Variant v = variant(p.type, p.act, way_for(p));
  const std::string name = name_of(v);
  int shared_bytes = 0;
  if (const cudaError_t status = prepare(v, &shared_bytes); status != cudaSuccess) {
    return reason(status, "preparing the kernel", name.c_str(), p, capability);
  }
  const int64_t copies = v.copy_bytes / size_of(p.type);  // elements in one
  Pointwise q = p;
  int n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  auto a_rows = static_cast<uint32_t>(a_stride(p) / copies);
  auto w_rows = static_cast<uint32_t>(p.k / copies);
  void* arguments[] = {&q.a, &q.w, &q.bias, &q.scale, &q.shift, &q.d, &q.m, &n, &k, &a_rows, &w_rows};
  const dim3 grid(static_cast<unsigned>(tiles(p, v.tile_m, v.tile_n)));
  const cudaError_t status =
      cudaLaunchKernel(reinterpret_cast<const void*>(v.kernel), grid, dim3(kThreads), arguments,
                       static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
  return reason(status, "cudaLaunchKernel", name.c_str(), p, capability);
}

}  // namespace

const Family& mma_family() {
  static const Family family{"mma.sync", serves, refusal, launch};
  return family;
}

}  // namespace convmixer_fast::cuda
