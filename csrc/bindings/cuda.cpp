// convmixer_fast._cuda: the kernels of csrc/cuda for Python. Checks arguments, lets go of the GIL, calls.
//
// Nothing here or at import asks for a GPU or a driver: the first call that queues a kernel does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/pointwise.h"

#include "build_config.h"

namespace py = pybind11;
namespace cmf = convmixer_fast;

namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw py::value_error(message);
}

const std::vector<const cmf::cuda::Family*>& families() {
  static const std::vector<const cmf::cuda::Family*> all = {
      &cmf::cuda::mma_family(),
#ifdef CONVMIXER_FAST_HAVE_WGMMA
      &cmf::cuda::wgmma_family(),
#endif
  };
  return all;
}

const cmf::cuda::Family& family_named(const std::string& name) {
  std::string names;
  for (const cmf::cuda::Family* family : families()) {
    if (name == family->name) return *family;
    names += (names.empty() ? "" : ", ") + std::string(family->name);
  }
  throw py::value_error("family: must be one of " + names + ", got " + name);
}

cmf::cuda::Pointwise problem_of(std::uintptr_t a, std::uintptr_t w, std::uintptr_t bias,
                                std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t d,
                                std::int64_t m, std::int64_t n, std::int64_t k,
                                std::int64_t a_stride, int type, int act) {
  const std::pair<const char*, std::int64_t> sizes[] = {{"m", m}, {"n", n}, {"k", k}};
  for (const auto& [name, size] : sizes) {
    require(size >= 0, name + (": must not be negative, got " + std::to_string(size)));
  }
  require(a_stride >= k || m <= 1, "a_stride: rows of " + std::to_string(k) +
                                       " elements must not overlap, got " +
                                       std::to_string(a_stride));
  require(type >= 0 && type < cmf::cuda::kTypes,
          "type: must be 0 to " + std::to_string(cmf::cuda::kTypes - 1) + ", got " +
              std::to_string(type));
  require(act >= 0 && act < cmf::kActivations,
          "act: must be 0 to " + std::to_string(cmf::kActivations - 1) + ", got " +
              std::to_string(act));
  if (m > 0 && n > 0) {
    const std::pair<const char*, std::uintptr_t> addresses[] = {
        {"scale_ptr", scale}, {"shift_ptr", shift}, {"d_ptr", d}};
    for (const auto& [name, address] : addresses) {
      require(address != 0, name + std::string(": must not be null"));
    }
    require(k == 0 || (a != 0 && w != 0), "a_ptr and w_ptr: must not be null");
    require(a != d, "d_ptr: must not be a_ptr, the operator does not work in place");
  }
  cmf::cuda::Pointwise problem;
  problem.a = reinterpret_cast<const void*>(a);
  problem.w = reinterpret_cast<const void*>(w);
  problem.bias = reinterpret_cast<const float*>(bias);
  problem.scale = reinterpret_cast<const float*>(scale);
  problem.shift = reinterpret_cast<const float*>(shift);
  problem.d = reinterpret_cast<void*>(d);
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.a_stride = a_stride;
  problem.type = static_cast<cmf::cuda::Type>(type);
  problem.act = static_cast<cmf::Activation>(act);
  return problem;
}

std::string refusal(const std::string& family, std::uintptr_t a, std::uintptr_t w,
                    std::uintptr_t bias, std::uintptr_t scale, std::uintptr_t shift,
                    std::uintptr_t d, std::int64_t m, std::int64_t n, std::int64_t k,
                    std::int64_t a_stride, int type, int act, int capability) {
  const cmf::cuda::Family& kernels = family_named(family);
  if (!kernels.serves(capability)) {
    return "the " + family + " kernels are not for sm_" + std::to_string(capability);
  }
  return kernels.refusal(
      problem_of(a, w, bias, scale, shift, d, m, n, k, a_stride, type, act), capability);
}

void pointwise_mix(const std::string& family, std::uintptr_t a, std::uintptr_t w,
                   std::uintptr_t bias, std::uintptr_t scale, std::uintptr_t shift,
                   std::uintptr_t d, std::int64_t m, std::int64_t n, std::int64_t k,
                   std::int64_t a_stride, int type, int act, int capability,
                   std::uintptr_t stream) {
  const cmf::cuda::Family& kernels = family_named(family);
  const cmf::cuda::Pointwise problem =
      problem_of(a, w, bias, scale, shift, d, m, n, k, a_stride, type, act);
  std::string error;
  {
    const py::gil_scoped_release release;
    error = kernels.launch(problem, capability, reinterpret_cast<void*>(stream));
  }
  if (!error.empty()) throw std::runtime_error(error);
}

std::vector<std::string> family_names() {
  std::vector<std::string> names;
  for (const cmf::cuda::Family* family : families()) names.emplace_back(family->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of convmixer_fast. Addresses and sizes in, no tensors: see _native_cuda.";
  m.attr("__version__") = CONVMIXER_FAST_VERSION;
  m.attr("few_outputs") = cmf::cuda::kFewOutputs;
  m.def("families", &family_names, "Names of the kernel families in this build.");
  m.def(
      "serves",
      [](const std::string& family, int capability) {
        return family_named(family).serves(capability);
      },
      py::arg("family"), py::arg("capability"),
      "Whether a family has kernels for a compute capability such as 89.");
  m.def("refusal", &refusal, py::arg("family"), py::arg("a_ptr"), py::arg("w_ptr"),
        py::arg("bias_ptr"), py::arg("scale_ptr"), py::arg("shift_ptr"), py::arg("d_ptr"),
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a_stride"), py::arg("type"),
        py::arg("act"), py::arg("capability"),
        "Why a family cannot take a problem; an empty string where it can. Reads no memory.");
  m.def("pointwise_mix", &pointwise_mix, py::arg("family"), py::arg("a_ptr"), py::arg("w_ptr"),
        py::arg("bias_ptr"), py::arg("scale_ptr"), py::arg("shift_ptr"), py::arg("d_ptr"),
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a_stride"), py::arg("type"),
        py::arg("act"), py::arg("capability"), py::arg("stream"),
        "Queue d = scale * act(a w^T + bias) + shift on a stream of the current device.\n\n"
        "bias_ptr may be 0. Raises RuntimeError where the kernel cannot be queued.");
  m.def("types", [] {
    return std::vector<std::string>(cmf::cuda::kTypeNames,
                                    cmf::cuda::kTypeNames + cmf::cuda::kTypes);
  });
  m.def("activations", [] {
    return std::vector<std::string>(cmf::kActivationNames,
                                    cmf::kActivationNames + cmf::kActivations);
  });
  m.def(
      "compiler", [] { return std::string(CONVMIXER_FAST_NVCC); }, "What compiled the kernels.");
  m.def(
      "architectures", [] { return std::string(CONVMIXER_FAST_ARCHITECTURES); },
      "For what the kernels were compiled: sm_80 is machine code, compute_80 PTX.");
}
