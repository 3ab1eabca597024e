// How does a CUDA status become a reason? One line with the kernel, the shape, the architecture and the
// error's name.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "pointwise.h"

namespace convmixer_fast::cuda {

inline std::string describe(const Pointwise& p) {
  return std::to_string(p.m) + " x " + std::to_string(p.k) + " -> " + std::to_string(p.n) + " " +
         kTypeNames[static_cast<int>(p.type)] + " " + kActivationNames[static_cast<int>(p.act)];
}

// "" for cudaSuccess. Takes the error off the runtime's record, where a later call would find it.
inline std::string reason(cudaError_t status, const char* call, const char* kernel, const Pointwise& p,
                          int capability) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(kernel) + " (" + describe(p) + ", sm_" + std::to_string(capability) + "): " + call +
         " failed with " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")";
}

}  // namespace convmixer_fast::cuda
