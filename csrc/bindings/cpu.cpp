// convmixer_fast._cpu: the CPU engine for Python. Checks arguments, releases the GIL, calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "cpu/depthwise/depthwise.h"
#include "cpu/engine/fingerprint.h"
#include "cpu/engine/isa.h"
#include "cpu/engine/stack.h"
#include "cpu/engine/threads.h"
#include "cpu/epilogue/pass.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/gemm/pointwise.h"
#include "cpu/peak/peak.h"

#include "build_config.h"

namespace py = pybind11;
namespace cmf = convmixer_fast;

namespace {

// Signals are checked about every tenth of a second of one core.
constexpr double kInterruptMultiplyAdds = 4e9;

using Four = std::array<std::int64_t, 4>;

void require(bool ok, const std::string& message) {
  if (!ok) throw py::value_error(message);
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check_settings(int act, int layout, int threads) {
  require(act >= 0 && act < cmf::kActivations,
          "act: must be 0 to " + std::to_string(cmf::kActivations - 1) + ", got " +
              std::to_string(act));
  require(layout == 0 || layout == 1,
          "layout: must be 0 (planar) or 1 (channels-last), got " + std::to_string(layout));
  require(threads >= 1, "threads: must be at least 1, got " + std::to_string(threads));
}

void check_strassen(int levels) {
  require(levels >= cmf::kFastestLevels && levels <= 1,
          "strassen_levels: must be -1 (the fastest), 0 or 1, got " + std::to_string(levels));
}

void depthwise_mix(std::uintptr_t x, const Four& x_strides, std::uintptr_t y, const Four& y_strides,
                   const Four& shape, std::int64_t k, std::uintptr_t weight, std::uintptr_t bias,
                   std::uintptr_t scale, std::uintptr_t shift, int act, int layout, int threads) {
  const auto [n, c, h, w] = shape;
  for (std::int64_t size : shape) {
    require(size >= 0, "shape: sizes must not be negative, got " + std::to_string(size));
  }
  require(k >= 1, "k: the kernel size must be at least 1, got " + std::to_string(k));
  check_settings(act, layout, threads);
  if (n == 0 || c == 0 || h == 0 || w == 0) return;

  const int inner = layout == 0 ? 3 : 1;
  const std::string stride_one = layout == 0 ? "a planar tensor has w stride 1, got "
                                             : "a channels-last tensor has c stride 1, got ";
  const std::pair<const char*, const Four*> strides[] = {{"x_strides", &x_strides},
                                                         {"y_strides", &y_strides}};
  for (const auto& [name, values] : strides) {
    const std::int64_t stride = (*values)[inner];
    require(shape[inner] == 1 || stride == 1, name + (": " + stride_one) + std::to_string(stride));
  }
  for (int axis = 0; axis < 4; ++axis) {
    require(shape[axis] == 1 || y_strides[axis] > 0,
            "y_strides: elements of y must not share memory, got stride " +
                std::to_string(y_strides[axis]) + " for axis " + std::to_string(axis));
  }
  const std::pair<const char*, std::uintptr_t> addresses[] = {{"x_ptr", x},
                                                              {"y_ptr", y},
                                                              {"weight_ptr", weight},
                                                              {"scale_ptr", scale},
                                                              {"shift_ptr", shift}};
  for (const auto& [name, address] : addresses) {
    require(address != 0, name + std::string(": must not be null"));
  }
  require(x != y, "y_ptr: must not be x_ptr, the operator does not work in place");

  cmf::DepthwiseMix problem;
  problem.x = pointer<const float>(x);
  problem.y = pointer<float>(y);
  for (int axis = 0; axis < 4; ++axis) {
    problem.x_stride[axis] = x_strides[axis];
    problem.y_stride[axis] = y_strides[axis];
  }
  problem.n = n;
  problem.c = c;
  problem.h = h;
  problem.w = w;
  problem.k = k;
  problem.weight = pointer<const float>(weight);
  problem.bias = pointer<const float>(bias);
  problem.scale = pointer<const float>(scale);
  problem.shift = pointer<const float>(shift);
  problem.act = static_cast<cmf::Activation>(act);
  const py::gil_scoped_release release;
  cmf::depthwise_mix(problem, static_cast<cmf::Layout>(layout), threads);
}

void epilogue_(std::uintptr_t h, const std::array<std::int64_t, 3>& shape, std::uintptr_t scale,
               std::uintptr_t shift, int act, int layout, int threads) {
  for (std::int64_t size : shape) {
    require(size >= 0, "shape: sizes must not be negative, got " + std::to_string(size));
  }
  check_settings(act, layout, threads);
  if (shape[0] == 0 || shape[1] == 0 || shape[2] == 0) return;
  const std::pair<const char*, std::uintptr_t> addresses[] = {
      {"h_ptr", h}, {"scale_ptr", scale}, {"shift_ptr", shift}};
  for (const auto& [name, address] : addresses) {
    require(address != 0, name + std::string(": must not be null"));
  }
  const cmf::Epilogue problem = {pointer<float>(h),
                                 shape[0],
                                 shape[1],
                                 shape[2],
                                 pointer<const float>(scale),
                                 pointer<const float>(shift),
                                 static_cast<cmf::Activation>(act)};
  const py::gil_scoped_release release;
  cmf::apply_epilogue(problem, static_cast<cmf::Layout>(layout), threads);
}

void pointwise(std::uintptr_t x, const Four& x_strides, std::uintptr_t z, const Four& shape,
               std::int64_t patch, std::int64_t c_out, std::uintptr_t weight, std::uintptr_t bias,
               std::uintptr_t scale, std::uintptr_t shift, int act, int strassen_levels, int threads) {
  for (std::int64_t size : shape) {
    require(size >= 0, "shape: sizes must not be negative, got " + std::to_string(size));
  }
  require(patch >= 1, "patch: must be at least 1, got " + std::to_string(patch));
  require(c_out >= 0, "c_out: must not be negative, got " + std::to_string(c_out));
  check_settings(act, 0, threads);
  check_strassen(strassen_levels);
  if (shape[0] == 0 || c_out == 0 || shape[2] < patch || shape[3] < patch) return;
  require(shape[1] >= 1, "shape: there must be at least 1 channel, got " + std::to_string(shape[1]));
  const std::pair<const char*, std::uintptr_t> addresses[] = {{"x_ptr", x},
                                                              {"z_ptr", z},
                                                              {"weight_ptr", weight},
                                                              {"scale_ptr", scale},
                                                              {"shift_ptr", shift}};
  for (const auto& [name, address] : addresses) {
    require(address != 0, name + std::string(": must not be null"));
  }
  require(x != z, "z_ptr: must not be x_ptr, the operator does not work in place");
  cmf::Pointwise problem;
  problem.x = pointer<const float>(x);
  for (int axis = 0; axis < 4; ++axis) problem.x_stride[axis] = x_strides[axis];
  problem.z = pointer<float>(z);
  problem.n = shape[0];
  problem.c = shape[1];
  problem.h = shape[2];
  problem.w = shape[3];
  problem.patch = patch;
  problem.c_out = c_out;
  problem.weight = pointer<const float>(weight);
  problem.bias = pointer<const float>(bias);
  problem.scale = pointer<const float>(scale);
  problem.shift = pointer<const float>(shift);
  problem.act = static_cast<cmf::Activation>(act);
  problem.strassen_levels = strassen_levels;
  const py::gil_scoped_release release;
  cmf::pointwise(problem, threads);
}

void check_mixer(std::int64_t c, std::int64_t k) {
  require(c >= 1, "c: there must be at least 1 channel, got " + std::to_string(c));
  require(k >= 1, "k: the kernel size must be at least 1, got " + std::to_string(k));
}

std::int64_t mixer_packed_floats(std::int64_t c, std::int64_t k) {
  check_mixer(c, k);
  return cmf::mixer_packed_floats(c, k);
}

void mixer_pack(const std::array<std::uintptr_t, 7>& parameters, std::int64_t c, std::int64_t k,
                std::uintptr_t packed) {
  check_mixer(c, k);
  require(packed != 0, "packed_ptr: must not be null");
  for (int i : {0, 2, 3, 5, 6}) {
    require(parameters[i] != 0, "parameter_ptrs: only the biases, 1 and 4, may be null");
  }
  const auto at = [&](int i) { return pointer<const float>(parameters[i]); };
  const cmf::MixerBlock block{at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
  const py::gil_scoped_release release;
  cmf::mixer_pack(block, c, k, pointer<float>(packed));
}

void mixer_stack(std::uintptr_t x, std::uintptr_t z, const Four& shape, std::int64_t k,
                 const std::vector<std::uintptr_t>& packed,
                 const std::vector<std::uintptr_t>& weights, int act, int strassen_levels,
                 int threads) {
  const auto [n, c, h, w] = shape;
  for (std::int64_t size : shape) {
    require(size >= 0, "shape: sizes must not be negative, got " + std::to_string(size));
  }
  check_settings(act, 0, threads);
  check_strassen(strassen_levels);
  if (n == 0 || c == 0 || h == 0 || w == 0) return;
  check_mixer(c, k);
  require(!packed.empty(), "packed_ptrs: there must be at least 1 block");
  require(x != 0, "x_ptr: must not be null");
  require(z != 0, "z_ptr: must not be null");
  require(weights.size() == packed.size(),
          "weight_ptrs: must be as many as packed_ptrs, " + std::to_string(packed.size()) + ", got " +
              std::to_string(weights.size()));
  std::vector<const float*> blocks, matrices;
  for (std::size_t i = 0; i < packed.size(); ++i) {
    require(packed[i] != 0 && weights[i] != 0, "packed_ptrs, weight_ptrs: must not be null");
    blocks.push_back(pointer<const float>(packed[i]));
    matrices.push_back(pointer<const float>(weights[i]));
  }
  cmf::MixerStack stack;
  stack.x = pointer<const float>(x);
  stack.z = pointer<float>(z);
  stack.n = n;
  stack.c = c;
  stack.h = h;
  stack.w = w;
  stack.k = k;
  stack.blocks = blocks.data();
  stack.weights = matrices.data();
  stack.strassen_levels = strassen_levels;
  stack.depth = static_cast<std::int64_t>(blocks.size());
  stack.act = static_cast<cmf::Activation>(act);
  // As many images at a time as keep all threads busy: Ctrl-C is handled between them.
  const std::int64_t together = cmf::mixer_images(h, w);
  const double work = 1.0 * together * c * h * w * (c + k * k) * stack.depth;
  const std::int64_t rounds = 1 + static_cast<std::int64_t>(kInterruptMultiplyAdds / work);
  for (std::int64_t begin = 0; begin < n;) {
    const std::int64_t end = std::min(n, begin + rounds * threads * together);
    {
      const py::gil_scoped_release release;
      cmf::mixer_stack(stack, begin, end, threads);
    }
    begin = end;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

void mixer_band(std::uintptr_t x, const std::array<std::int64_t, 3>& x_strides,
                const Four& margins, std::uintptr_t z, const std::array<std::int64_t, 2>& z_strides,
                const Four& shape, std::int64_t k, std::uintptr_t packed, std::uintptr_t weight,
                int act, int strassen_levels, std::int64_t map_pixels, int threads) {
  const auto [n, c, h, w] = shape;
  for (std::int64_t size : shape) {
    require(size >= 0, "shape: sizes must not be negative, got " + std::to_string(size));
  }
  for (std::int64_t margin : margins) {
    require(margin >= 0, "margins: must not be negative, got " + std::to_string(margin));
  }
  check_settings(act, 0, threads);
  check_strassen(strassen_levels);
  if (n == 0 || c == 0 || h == 0 || w == 0) return;
  check_mixer(c, k);
  const std::pair<const char*, std::uintptr_t> addresses[] = {
      {"x_ptr", x}, {"z_ptr", z}, {"packed_ptr", packed}, {"weight_ptr", weight}};
  for (const auto& [name, address] : addresses) {
    require(address != 0, name + std::string(": must not be null"));
  }
  require(c == 1 || z_strides[1] >= h * w, "z_strides: channels of z must not overlap, got stride " +
                                               std::to_string(z_strides[1]));
  cmf::MixerBand band;
  band.x = pointer<const float>(x);
  for (int axis = 0; axis < 3; ++axis) band.x_stride[axis] = x_strides[axis];
  band.above = margins[0];
  band.below = margins[1];
  band.left = margins[2];
  band.right = margins[3];
  band.z = pointer<float>(z);
  band.z_stride[0] = z_strides[0];
  band.z_stride[1] = z_strides[1];
  band.n = n;
  band.c = c;
  band.h = h;
  band.w = w;
  band.k = k;
  band.block = pointer<const float>(packed);
  band.weight = pointer<const float>(weight);
  band.act = static_cast<cmf::Activation>(act);
  band.strassen_levels = strassen_levels;
  band.map_pixels = map_pixels;
  const py::gil_scoped_release release;
  cmf::mixer_band(band, threads);
}

// Without pybind11's conversion, which takes as long as the hash.
std::uint64_t fingerprint(const py::list& pieces) {
  std::vector<cmf::Piece> list;
  list.reserve(pieces.size());
  for (const py::handle piece : pieces) {
    if (!PyTuple_Check(piece.ptr()) || PyTuple_GET_SIZE(piece.ptr()) != 3) {
      throw py::type_error("pieces: must be tuples (address, bytes, bytes of a row)");
    }
    std::size_t numbers[3];
    for (Py_ssize_t i = 0; i < 3; ++i) {
      numbers[i] = PyLong_AsSize_t(PyTuple_GET_ITEM(piece.ptr(), i));
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
    require(numbers[0] != 0 || numbers[1] == 0, "pieces: a null address has no bytes");
    list.push_back({pointer<const void>(numbers[0]), numbers[1], numbers[2]});
  }
  return cmf::fingerprint(list.data(), list.size());
}

py::dict build_info() {
  py::dict flags;
#define CONVMIXER_FAST_ISA_FLAGS(name, text) flags[name] = text;
  CONVMIXER_FAST_FOR_EACH_ISA
#undef CONVMIXER_FAST_ISA_FLAGS
  py::dict info;
  info["version"] = CONVMIXER_FAST_VERSION;
  info["compiler"] = CONVMIXER_FAST_COMPILER;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["flags"] = CONVMIXER_FAST_FLAGS;
  info["isas"] = flags;
  return info;
}

std::vector<std::string> activations() {
  return {std::begin(cmf::kActivationNames), std::end(cmf::kActivationNames)};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU engine of convmixer_fast: raw addresses in, no torch inside.";
  m.def("depthwise_mix", &depthwise_mix, py::arg("x_ptr"), py::arg("x_strides"), py::arg("y_ptr"),
        py::arg("y_strides"), py::arg("shape"), py::arg("k"), py::arg("weight_ptr"),
        py::arg("bias_ptr"), py::arg("scale_ptr"), py::arg("shift_ptr"), py::arg("act"),
        py::arg("layout"), py::arg("threads"),
        "y = x + scale * act(depthwise_conv(x, weight) + bias) + shift, float32, 'same' zero "
        "padding. Strides are in floats, in the order n, c, h, w, as shape is. act indexes "
        "activations(); layout 0 is planar (w stride 1, weight [c][k*k]), 1 channels-last (c "
        "stride 1, weight [k*k][c]); bias_ptr 0 means none. y must not overlap x.");
  m.def("epilogue_", &epilogue_, py::arg("h_ptr"), py::arg("shape"), py::arg("scale_ptr"),
        py::arg("shift_ptr"), py::arg("act"), py::arg("layout"), py::arg("threads"),
        "h = scale * act(h) + shift in place, float32. shape is (n, c, pixels); h is dense, "
        "[n][c][pixels] in layout 0 (planar), [n][pixels][c] in layout 1 (channels-last).");
  m.def("pointwise", &pointwise, py::arg("x_ptr"), py::arg("x_strides"), py::arg("z_ptr"),
        py::arg("shape"), py::arg("patch"), py::arg("c_out"), py::arg("weight_ptr"),
        py::arg("bias_ptr"), py::arg("scale_ptr"), py::arg("shift_ptr"), py::arg("act"),
        py::arg("strassen_levels"), py::arg("threads"),
        "z = scale * act(conv(x, weight, stride=patch) + bias) + shift, float32. shape is x's "
        "(n, c, h, w), x_strides in floats; weight [c_out][c][patch][patch]; z contiguous "
        "(n, c_out, h / patch, w / patch); bias_ptr 0 means none. z must not overlap x.");
  m.def("mixer_packed_floats", &mixer_packed_floats, py::arg("c"), py::arg("k"),
        "Floats of one packed block of c channels and a k x k kernel.");
  m.def("mixer_pack", &mixer_pack, py::arg("parameter_ptrs"), py::arg("c"), py::arg("k"),
        py::arg("packed_ptr"),
        "Packs one block for mixer_stack. parameter_ptrs: taps [c][k*k], bias1 or 0, scale1, shift1, "
        "bias2 or 0, scale2, shift2.");
  m.def("mixer_stack", &mixer_stack, py::arg("x_ptr"), py::arg("z_ptr"), py::arg("shape"),
        py::arg("k"), py::arg("packed_ptrs"), py::arg("weight_ptrs"), py::arg("act"),
        py::arg("strassen_levels"), py::arg("threads"),
        "A stack of ConvMixer blocks on contiguous float32 maps (n, c, h, w); z may be x, but not "
        "overlap it otherwise. weight_ptrs: the pointwise weights [c][c]. Raises KeyboardInterrupt between images.");
  m.def("joined_pixels", &cmf::joined_pixels, py::arg("c_in"), py::arg("c_out"),
        py::arg("strassen_levels"),
        "The number of neighbouring pixels of a map that may be multiplied together; 1 for the direct "
        "GEMM.");
  m.def("mixer_band", &mixer_band, py::arg("x_ptr"), py::arg("x_strides"), py::arg("margins"),
        py::arg("z_ptr"), py::arg("z_strides"), py::arg("shape"), py::arg("k"),
        py::arg("packed_ptr"), py::arg("weight_ptr"), py::arg("act"), py::arg("strassen_levels"),
        py::arg("map_pixels"), py::arg("threads"),
        "One ConvMixer block on a band of a larger float32 map. x_ptr is the pixel of x at the "
        "output's first, x_strides n, c, h in floats (w stride 1), margins the rows above and below and "
        "the columns left and right of it that are the map's own; z_strides n, c, a channel's "
        "pixels are contiguous. z must not overlap x.");
  m.def("fingerprint", &fingerprint, py::arg("pieces"),
        "A 64-bit hash of the contents of (address, bytes, bytes of a row) pieces: small ones whole, of "
        "larger ones a sample a row.");
  m.def(
      "multiply_add_rate",
      [](int threads, double seconds) {
        require(threads >= 1, "threads: must be at least 1, got " + std::to_string(threads));
        const py::gil_scoped_release release;
        return cmf::multiply_add_rate(threads, seconds);
      },
      py::arg("threads"), py::arg("seconds") = 0.1,
      "Float multiply-adds a second of that many threads on registers alone: the machine's limit "
      "for the instruction set in use.");
  m.def("isa", [] { return std::string(cmf::active_isa().name); }, "The instruction set in use.");
  m.def("isas", &cmf::usable_isas, "The instruction sets built and supported here, best last.");
  m.def("set_isa", &cmf::set_isa, py::arg("name"), "Selects that instruction set for all later calls (tests).");
  m.def("threading_backend", &cmf::threading_backend,
        "'gomp:<file of the OpenMP runtime in use>' or 'std::thread'.");
  m.def("build_info", &build_info, "Compiler, flags per instruction set, version, C++ standard.");
  m.def("activations", &activations, "Names of the activations, in the order of their numbers.");
}
