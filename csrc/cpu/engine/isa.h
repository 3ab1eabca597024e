// The table of instruction sets. Each is compiled from the same sources with its own flags (simd.h); the
// best one that this machine and its operating system support is chosen at first use. CONVMIXER_FAST_ISA in
// the environment, or set_isa, lowers the choice.
#pragma once

#include <string>
#include <vector>

#include "cpu/depthwise/depthwise.h"
#include "cpu/epilogue/pass.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/peak/peak.h"

namespace convmixer_fast {

struct Isa {
  const char* name;
  bool (*supported)();
  DepthwiseKernels depthwise;
  EpilogueKernels epilogue;
  GemmKernels gemm;
  PeakKernel peak;
};

// The set in use. Throws std::invalid_argument, on every call until it is corrected, if
// CONVMIXER_FAST_ISA names a set that is unknown, was not built, or is not supported here.
const Isa& active_isa();

// The sets that were built and that this machine supports, the best one last.
std::vector<std::string> usable_isas();

// Selects that set for all later calls, in every thread. Throws std::invalid_argument as active_isa does.
void set_isa(const std::string& name);

}  // namespace convmixer_fast
