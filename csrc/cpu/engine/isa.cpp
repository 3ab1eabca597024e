#include "cpu/engine/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "build_config.h"

namespace convmixer_fast {

namespace baseline {
extern const DepthwiseKernels depthwise_kernels;
extern const EpilogueKernels epilogue_kernels;
extern const GemmKernels gemm_kernels;
extern const PeakKernel peak_kernels;
}
#ifdef CONVMIXER_FAST_HAVE_AVX2
namespace avx2 {
extern const DepthwiseKernels depthwise_kernels;
extern const EpilogueKernels epilogue_kernels;
extern const GemmKernels gemm_kernels;
extern const PeakKernel peak_kernels;
}
#endif
#ifdef CONVMIXER_FAST_HAVE_AVX512
namespace avx512 {
extern const DepthwiseKernels depthwise_kernels;
extern const EpilogueKernels epilogue_kernels;
extern const GemmKernels gemm_kernels;
extern const PeakKernel peak_kernels;
}
#endif

namespace {

// From the plainest to the best. __builtin_cpu_supports includes the check that the operating system saves
// the wide registers.
const std::vector<Isa>& built_isas() {
#if defined(__x86_64__)
  // Not every compiler's runtime initialises its CPU model before this.
  __builtin_cpu_init();
#endif
  static const std::vector<Isa> isas = {
      {"baseline", [] { return true; }, baseline::depthwise_kernels, baseline::epilogue_kernels,
       baseline::gemm_kernels, baseline::peak_kernels},
#ifdef CONVMIXER_FAST_HAVE_AVX2
      {"avx2",
       [] { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; },
       avx2::depthwise_kernels, avx2::epilogue_kernels,
       avx2::gemm_kernels, avx2::peak_kernels},
#endif
#ifdef CONVMIXER_FAST_HAVE_AVX512
      {"avx512",
       [] {
         return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
                __builtin_cpu_supports("avx512dq") != 0 &&
                __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("fma") != 0;
       },
       avx512::depthwise_kernels, avx512::epilogue_kernels,
       avx512::gemm_kernels, avx512::peak_kernels},
#endif
  };
  return isas;
}

std::atomic<const Isa*> active{nullptr};

std::string usable_list() {
  std::string list;
  for (const std::string& name : usable_isas()) list += (list.empty() ? "" : ", ") + name;
  return list;
}

const Isa& find_isa(const std::string& name, const std::string& who) {
  for (const Isa& isa : built_isas()) {
    if (name != isa.name) continue;
    if (isa.supported()) return isa;
    throw std::invalid_argument(who + ": this machine does not support " + name + "; use one of " +
                                usable_list());
  }
  const bool known = name == "avx2" || name == "avx512";
  throw std::invalid_argument(who + ": " + (known ? "this build has no " : "unknown instruction set ") +
                              (name.empty() ? "''" : name) + "; use one of " + usable_list());
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : built_isas()) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

const Isa& active_isa() {
  if (const Isa* isa = active.load(std::memory_order_acquire)) return *isa;
  const char* wanted = std::getenv("CONVMIXER_FAST_ISA");
  const Isa& isa = wanted != nullptr && *wanted != '\0'
                       ? find_isa(wanted, "CONVMIXER_FAST_ISA")
                       : find_isa(usable_isas().back(), "isa");
  active.store(&isa, std::memory_order_release);
  return isa;
}

void set_isa(const std::string& name) {
  active.store(&find_isa(name, "isa"), std::memory_order_release);
}

}  // namespace convmixer_fast
