// As much of the CUDA runtime as csrc/cuda calls: one device that runs kernels at once, emulated.
#pragma once

#include <cstdlib>
#include <cstring>

#include "cuda_emu.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotPermitted = 800 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaFuncAttributes {
  int ptxVersion;
};

// The order that a launch's warps take, and which of its blocks run: those that the function wants.
inline unsigned emulated_seed = 1;
inline std::function<bool(unsigned block)> emulated_wants = [](unsigned) { return true; };

// The status of a call that goes well unless EMULATED_FAILURE names it; what failed stays on the record
// until it is asked for.
inline cudaError_t emulated_record = cudaSuccess;
inline cudaError_t emulated_status(const char* call) {
  const char* fails = std::getenv("EMULATED_FAILURE");
  if (fails != nullptr && std::strcmp(fails, call) == 0) emulated_record = cudaErrorNotPermitted;
  return emulated_record;
}

inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorNotPermitted ? "cudaErrorNotPermitted" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorNotPermitted ? "operation not permitted" : "invalid argument";
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t status = emulated_record;
  emulated_record = cudaSuccess;
  return status;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return emulated_status("cudaGetDevice");
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = __CUDA_ARCH__ / 10;
  return emulated_status("cudaFuncGetAttributes");
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  if (const cudaError_t status = emulated_status("cudaFuncSetAttribute"); status != cudaSuccess) {
    return status;
  }
  return bytes <= (__CUDA_ARCH__ / 10 == 80 ? 163 : 99) * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

using EmulatedKernel = void (*)(const uint8_t*, const uint8_t*, const float*, const float*, const float*,
                                uint8_t*, int64_t, int, int, uint32_t, uint32_t);
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** p,
                                    size_t shared_bytes, cudaStream_t) {
  if (const cudaError_t status = emulated_status("cudaLaunchKernel"); status != cudaSuccess) return status;
  auto run = reinterpret_cast<EmulatedKernel>(const_cast<void*>(kernel));
  auto bytes = [&](int i) { return *static_cast<const uint8_t**>(p[i]); };
  auto floats = [&](int i) { return *static_cast<const float**>(p[i]); };
  emu::grid_dim = grid;
  emu::block_dim = block;
  emu::body = [&] {
    run(bytes(0), bytes(1), floats(2), floats(3), floats(4), *static_cast<uint8_t**>(p[5]),
        *static_cast<int64_t*>(p[6]), *static_cast<int*>(p[7]), *static_cast<int*>(p[8]),
        *static_cast<uint32_t*>(p[9]), *static_cast<uint32_t*>(p[10]));
  };
  std::mt19937 order(emulated_seed);
  emu::threads.clear();
  emu::threads.resize(block.x);
  // Nothing beyond what was asked for: AddressSanitizer watches the end.
  emu::dynamic_shared.assign(shared_bytes, static_cast<char>(0xff));
  for (unsigned x = 0; x < grid.x; ++x) {
    if (!emulated_wants(x)) continue;
    emu::block_index = dim3(x);
    emu::run_cta(block, order);
  }
  return cudaSuccess;
}
