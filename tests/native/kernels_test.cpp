// Random problems for every instruction set of this machine, against plain loops in double precision: values,
// and writes outside the kernels' memory.
//
// Tolerance, with u = 2^-24 (half a unit in the last place of 1) and t the terms of a sum: adding t
// terms of random sign in float rounds t partial sums, whose size grows as the square root of their
// number up to sqrt(sum of squares of the terms) = s. The errors add up as a random walk to a
// standard deviation of at most u * sqrt(t) * s / sqrt(6). kSum = 8 is 20 of those: nothing right
// ever fails, and at k = 9 one tap left out is 10^4 times too much. After the sum each step rounds
// relative to its own result; kStep = 4 covers two or three roundings and the polynomials of the
// activations (activation.h). An activation's slope is at most 1.5 (hardswish).
#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <set>

#include "cpu/depthwise/depthwise.h"
#include "cpu/engine/fingerprint.h"
#include "cpu/engine/isa.h"
#include "cpu/engine/stack.h"
#include "cpu/epilogue/pass.h"
#include "cpu/gemm/panel_gemm.h"
#include "cpu/gemm/pointwise.h"
#include "cpu/memory.h"
#include "cpu/peak/peak.h"
#include "support.h"

namespace convmixer_fast_test {
namespace {

namespace cmf = convmixer_fast;
using cmf::Activation;
using cmf::Layout;

constexpr double kUnit = 0x1p-24;
constexpr double kSum = 8.0;
constexpr double kStep = 4.0;
constexpr double kSlope = 1.5;

double activate(Activation act, double x) {
  switch (act) {
    case Activation::gelu: return x * 0.5 * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Activation::relu: return x < 0.0 ? 0.0 : x;
    case Activation::silu: return x / (1.0 + std::exp(-x));
    // NaN stays NaN: std::min and std::max return their first argument where nothing is less.
    case Activation::hardswish: return x * std::min(std::max(x + 3.0, 0.0), 6.0) / 6.0;
    case Activation::identity: return x;
  }
  return x;
}

// A value and how far a float result may be from it.
struct Expected {
  double value = 0.0, tolerance = 0.0;
};

// A sum of products, for its value and its tolerance.
struct Sum {
  double value = 0.0, squares = 0.0, inherited = 0.0;
  int64_t terms = 0;

  void add(double term) {
    value += term;
    squares += term * term;
    ++terms;
  }
  // A product with a factor that is itself only known to a tolerance.
  void add(double weight, const Expected& factor) {
    add(weight * factor.value);
    inherited += weight * factor.tolerance * weight * factor.tolerance;
  }
  Expected expected() const {
    return {value, kSum * kUnit * std::sqrt(static_cast<double>(terms) * squares) +
                       std::sqrt(inherited)};
  }
};

// base + scale * act(sum) + shift
Expected finish(const Expected& sum, Activation act, double scale, double shift, double base) {
  const double a = activate(act, sum.value);
  const double rounding = std::abs(scale) * (1.0 + std::abs(sum.value)) +
                          std::abs(scale * a) + std::abs(shift) + std::abs(base);
  return {base + scale * a + shift,
          std::abs(scale) * kSlope * sum.tolerance + kStep * kUnit * rounding};
}

// The largest error so far, as a part of its tolerance.
double worst = 0.0;

void check(float got, const Expected& expected, const std::string& problem, int64_t at) {
  const double error = std::abs(got - expected.value);
  bool right = error <= expected.tolerance;
  if (std::isnan(expected.value)) right = std::isnan(got);
  if (std::isinf(expected.value)) right = got == expected.value;
  if (!right) {
    throw Failure(text(problem, ": value ", at, " is ", got, ", expected ", expected.value,
                       " within ", expected.tolerance));
  }
  if (error > 0.0) worst = std::max(worst, error / expected.tolerance);
}

void require_same(const Floats& got, const Floats& first, const std::string& problem,
                  const std::string& what) {
  if (same_bits(got, first)) return;
  std::size_t at = 0;
  while (bits_of(got[at]) == bits_of(first[at])) ++at;
  throw Failure(text(problem, ": ", what, " changes value ", at, " from ", first[at], " to ",
                     got[at]));
}

// Where the elements of an (n, c, h, w) tensor lie in its memory.
struct Strides {
  std::array<int64_t, 4> shape, stride;
  int64_t floats;  // from the first element to the last

  int64_t at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
  }
};

// The axis `inner` has stride 1; the others lie in any order, dense or with gaps, of which `apart`
// says whether elements may share memory.
Strides random_strides(Random& random, const std::array<int64_t, 4>& shape, int inner, bool apart) {
  std::array<int, 4> order = {0, 1, 2, 3};
  std::swap(order[0], order[inner]);
  for (int i = 3; i > 1; --i) std::swap(order[i], order[random.integer(1, i)]);
  const bool dense = random.chance(40);
  Strides s{shape, {}, 1};
  int64_t next = 1;
  for (int axis : order) {
    s.stride[axis] = next;
    if (axis != inner && !dense) s.stride[axis] += random.integer(0, 5);
    if (axis != inner && !apart && random.chance(5)) s.stride[axis] = 0;
    // Of an axis of one element any stride is valid.
    if (shape[axis] == 1 && random.chance(20)) s.stride[axis] = random.integer(1, 9);
    s.floats += (shape[axis] - 1) * s.stride[axis];
    next = std::max(next, shape[axis] * s.stride[axis]);
  }
  return s;
}

int64_t random_kernel_size(Random& random) {
  return random.chance(50) ? random.one_of({3, 5, 7, 9}) : random.integer(1, 31);
}

int64_t random_channels(Random& random) {
  return random.chance(50) ? random.one_of({1, 3, 13, 99}) : random.integer(1, 40);
}

// Heights and widths, most of them near the sizes of vectors and tiles, some smaller than k.
int64_t random_side(Random& random) {
  return random.chance(50) ? random.one_of({1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33})
                           : random.integer(1, 40);
}

struct DepthwiseParameters {
  Floats taps, bias, scale, shift;  // taps [c][k*k]; bias empty: none
};

DepthwiseParameters depthwise_parameters(Random& random, int64_t c, int64_t k) {
  return {normals(random, c * k * k, 1.0f / static_cast<float>(k)),
          random.chance(80) ? normals(random, c) : Floats{}, scales(random, c), normals(random, c)};
}

const float* data_or_null(const Floats& values) { return values.empty() ? nullptr : values.data(); }

// The definition in depthwise.h, for one output.
template <class At>
Expected depthwise_at(const DepthwiseParameters& p, Activation act, int64_t k, int64_t height,
                      int64_t width, int64_t c, int64_t h, int64_t w, At&& x) {
  const int64_t before = (k - 1) / 2;
  Sum sum;
  sum.add(p.bias.empty() ? 0.0 : p.bias[c]);
  for (int64_t i = 0; i < k; ++i) {
    const int64_t y = h + i - before;
    if (y < 0 || y >= height) continue;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t z = w + j - before;
      if (z < 0 || z >= width) continue;
      sum.add(static_cast<double>(p.taps[(c * k + i) * k + j]) * x(y, z));
    }
  }
  return finish(sum.expected(), act, p.scale[c], p.shift[c], x(h, w));
}

void test_depthwise(Random& random, const std::vector<std::string>& isas) {
  const int64_t k = random_kernel_size(random);
  std::array<int64_t, 4> shape = {random.integer(1, 3), random_channels(random),
                                  random_side(random), random_side(random)};
  // Beyond the blocks of 256 columns, or of some hundred rows.
  if (random.chance(5)) shape[random.integer(2, 3)] = random.integer(250, 700);
  // Small enough for the double loop; one batch, then few channels, then few rows.
  for (int axis : {0, 1, 2, 3}) {
    const int64_t others = shape[0] * shape[1] * shape[2] * shape[3] / shape[axis] * k * k;
    shape[axis] = std::max<int64_t>(1, std::min(shape[axis], 1500000 / others));
  }
  const auto [n, c, h, w] = shape;
  const Layout layout = random.chance(50) ? Layout::planar : Layout::channels_last;
  const int inner = layout == Layout::planar ? 3 : 1;
  const Strides xs = random_strides(random, shape, inner, false);
  const Strides ys = random_strides(random, shape, inner, true);
  const Activation act = random.activation();
  const DepthwiseParameters p = depthwise_parameters(random, c, k);
  const Floats x = normals(random, xs.floats);
  Floats weight = p.taps;
  if (layout == Layout::channels_last) {
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t tap = 0; tap < k * k; ++tap) weight[tap * c + i] = p.taps[i * k * k + tap];
    }
  }

  std::string problem = text("depthwise ", layout == Layout::planar ? "planar" : "channels-last",
                             " n=", n, " c=", c, " h=", h, " w=", w, " k=", k, " act=",
                             cmf::kActivationNames[static_cast<int>(act)],
                             p.bias.empty() ? " no bias" : "", " x strides");
  for (int64_t stride : xs.stride) problem += text(" ", stride);
  problem += " y strides";
  for (int64_t stride : ys.stride) problem += text(" ", stride);

  std::vector<Expected> expected(static_cast<std::size_t>(ys.floats), Expected{0.0, -1.0});
  for (int64_t in = 0; in < n; ++in) {
    for (int64_t ic = 0; ic < c; ++ic) {
      for (int64_t ih = 0; ih < h; ++ih) {
        for (int64_t iw = 0; iw < w; ++iw) {
          expected[ys.at(in, ic, ih, iw)] =
              depthwise_at(p, act, k, h, w, ic, ih, iw, [&](int64_t row, int64_t col) {
                return static_cast<double>(x[xs.at(in, ic, row, col)]);
              });
        }
      }
    }
  }

  for (const std::string& isa : isas) {
    cmf::set_isa(isa);
    Floats first;
    for (int threads : {1, 2, 3}) {
      Floats y = untouched_floats(ys.floats);
      cmf::DepthwiseMix d;
      d.x = x.data();
      d.y = y.data();
      for (int axis = 0; axis < 4; ++axis) {
        d.x_stride[axis] = xs.stride[axis];
        d.y_stride[axis] = ys.stride[axis];
      }
      d.n = n;
      d.c = c;
      d.h = h;
      d.w = w;
      d.k = k;
      d.weight = weight.data();
      d.bias = data_or_null(p.bias);
      d.scale = p.scale.data();
      d.shift = p.shift.data();
      d.act = act;
      cmf::depthwise_mix(d, layout, threads);
      if (threads > 1) {
        require_same(y, first, problem + " isa=" + isa, text(threads, " threads"));
        continue;
      }
      for (int64_t i = 0; i < ys.floats; ++i) {
        if (expected[i].tolerance >= 0.0) {
          check(y[i], expected[i], problem + " isa=" + isa, i);
        } else if (bits_of(y[i]) != bits_of(untouched())) {
          throw Failure(text(problem, " isa=", isa, ": the gap at ", i, " of y was written"));
        }
      }
      first = std::move(y);
    }
  }
}

// Values at which the arithmetic of an activation could overflow, underflow or lose a NaN.
float extreme(Random& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float values[] = {0.0f,  -0.0f,  1e-40f, -1e-40f, 5.4f,  -5.4f, 88.8f,     -88.8f,
                          104.f, -104.f, 1e37f,  -1e37f,  3.0f,  -3.0f, kInfinity, -kInfinity,
                          std::numeric_limits<float>::quiet_NaN()};
  return values[random.integer(0, std::size(values) - 1)];
}

void test_epilogue(Random& random, const std::vector<std::string>& isas) {
  const Layout layout = random.chance(50) ? Layout::planar : Layout::channels_last;
  const int64_t n = random.integer(1, 4), c = random_channels(random);
  int64_t pixels = random_side(random) * random_side(random);
  if (random.chance(10)) pixels = random.integer(4000, 9000);
  pixels = std::min<int64_t>(pixels, 1 + 60000 / (n * c));
  const Activation act = random.activation();
  const Floats scale = scales(random, c), shift = normals(random, c);
  Floats h = normals(random, n * c * pixels, 3.0f);
  for (float& v : h) {
    if (random.chance(3)) v = extreme(random);
  }
  const std::string problem =
      text("epilogue ", layout == Layout::planar ? "planar" : "channels-last", " n=", n, " c=", c,
           " pixels=", pixels, " act=", cmf::kActivationNames[static_cast<int>(act)]);
  for (const std::string& isa : isas) {
    cmf::set_isa(isa);
    Floats first;
    for (int threads : {1, 2, 3}) {
      Floats out = h;
      cmf::apply_epilogue({out.data(), n, c, pixels, scale.data(), shift.data(), act}, layout, threads);
      if (threads > 1) {
        require_same(out, first, problem + " isa=" + isa, text(threads, " threads"));
        continue;
      }
      for (int64_t i = 0; i < n * c * pixels; ++i) {
        const int64_t channel = layout == Layout::planar ? i / pixels % c : i % c;
        check(out[i], finish({h[i], 0.0}, act, scale[channel], shift[channel], 0.0),
              problem + " isa=" + isa, i);
      }
      first = std::move(out);
    }
  }
}

// Where Strassen's algorithm is taken, and in the directly multiplied rest of such problems.
int64_t strassen_channels(Random& random) {
  return random.chance(50) ? 4 * random.integer(160, 200) : 2 * random.integer(128, 400);
}

void test_panel_gemm(Random& random, const std::vector<std::string>& isas) {
  // Now and then longer than the pieces that the kernel cuts a sum into.
  int64_t c_in = random_channels(random);
  if (random.chance(50)) c_in = random.chance(80) ? strassen_channels(random) : random.integer(500, 1100);
  // Strassen's algorithm needs a group of 12 channels, or of 24.
  int64_t c_out = random_channels(random);
  if (c_in > 500 && random.chance(60)) c_out = random.integer(20, 110);
  int64_t plane = random.integer(1, random.chance(50) ? 12 : 400);
  if (random.chance(10)) plane = random.integer(500, 800);
  plane = std::max<int64_t>(1, std::min(plane, 5000000 / (c_in * c_out)));
  // Strassen's algorithm on more than a tile of pixels, or on more than a chunk of input channels.
  if (random.chance(3)) {
    const bool pixels = random.chance(50);
    c_in = 4 * (pixels ? random.integer(160, 170) : random.integer(385, 400));
    c_out = random.integer(24, pixels ? 30 : 60);
    plane = pixels ? random.integer(513, 600) : random.integer(50, 80);
  }
  const Activation act = random.activation();
  Floats y = normals(random, c_in * plane);  // [c_in][pixel]
  // Values that are not finite stay in their pixels.
  const int64_t bad = random.chance(25) ? random.integer(1, 3) : 0;
  for (int64_t i = 0; i < bad; ++i) {
    const float inf = std::numeric_limits<float>::infinity();
    y[random.integer(0, c_in * plane - 1)] =
        random.chance(50) ? std::numeric_limits<float>::quiet_NaN() : random.chance(50) ? inf : -inf;
  }
  const Floats weight =
      normals(random, c_out * c_in, 1.0f / std::sqrt(static_cast<float>(c_in)));
  const Floats bias = random.chance(80) ? normals(random, c_out) : Floats{};
  const Floats scale = scales(random, c_out), shift = normals(random, c_out);
  const std::string problem =
      text("panels c_in=", c_in, " c_out=", c_out, " plane=", plane, " act=",
           cmf::kActivationNames[static_cast<int>(act)], bias.empty() ? " no bias" : "");
  std::vector<Expected> expected;
  for (int64_t co = 0; co < c_out; ++co) {
    for (int64_t at = 0; at < plane; ++at) {
      Sum sum;
      sum.add(bias.empty() ? 0.0 : bias[co]);
      for (int64_t k = 0; k < c_in; ++k) {
        sum.add(static_cast<double>(weight[co * c_in + k]) * y[k * plane + at]);
      }
      expected.push_back(finish(sum.expected(), act, scale[co], shift[co], 0.0));
    }
  }
  const int64_t gap = random.one_of({0, 1, 32});
  for (const std::string& isa : isas) {
    cmf::set_isa(isa);
    const cmf::GemmKernels& kernels = cmf::active_isa().gemm;
    const int64_t stride = (c_in + gap) * kernels.panel;
    const int64_t panels = (plane + kernels.panel - 1) / kernels.panel;
    const cmf::Floats memory = cmf::aligned_floats(panels * stride);
    float* panel = memory.get();
    for (int64_t i = 0; i < panels * stride; ++i) panel[i] = 1.0f;
    for (int64_t pixel = 0; pixel < plane; ++pixel) {
      for (int64_t k = 0; k < c_in; ++k) {
        panel[pixel / kernels.panel * stride + k * kernels.panel + pixel % kernels.panel] =
            y[k * plane + pixel];
      }
    }
    std::set<bool> done;
    for (int levels : {cmf::kFastestLevels, 0, 1}) {
      // Another number may select the same algorithm.
      if (!done.insert(kernels.uses_strassen(c_in, c_out, plane, levels)).second) continue;
      const int64_t groups = (c_out + kernels.group - 1) / kernels.group;
      const cmf::Floats scratch =
          cmf::aligned_floats(kernels.scratch_floats(c_in, c_out, levels));
      auto problem_of = [&](Floats& z) {
        cmf::PanelGemm p;
        p.panel_stride = stride;
        p.weight = weight.data();
        p.bias = data_or_null(bias);
        p.scale = scale.data();
        p.shift = shift.data();
        p.z = z.data();
        p.c_in = c_in;
        p.c_out = c_out;
        p.z_stride = p.plane = p.whole_plane = plane;
        p.act = act;
        p.strassen_levels = levels;
        return p;
      };
      Floats first;
      // All groups of a tile together, then each by itself.
      for (int64_t groups_each : {groups, int64_t{1}}) {
        Floats z = untouched_floats(c_out * plane);
        cmf::PanelGemm p = problem_of(z);
        for (int64_t at = 0; at < plane; at += kernels.tile) {
          p.panels = panel + at / kernels.panel * stride;
          for (int64_t group = 0; group < groups; group += groups_each) {
            p.again = group > 0 && random.chance(70);
            kernels.run(p, at, std::min(at + kernels.tile, plane), group,
                        std::min(group + groups_each, groups), scratch.get());
          }
        }
        const std::string where = problem + " isa=" + isa + text(" levels=", levels);
        if (!first.empty()) {
          require_same(z, first, where, "another cut");
          continue;
        }
        for (int64_t i = 0; i < c_out * plane; ++i) check(z[i], expected[i], where, i);
        first = std::move(z);
      }
      // The weights are read in place for one image of one or two panels, packed for three images together.
      const int64_t images = 3;
      if (images * panels * kernels.panel > kernels.tile) continue;
      const cmf::Floats together = cmf::aligned_floats(images * panels * stride);
      Floats z = untouched_floats(images * c_out * plane), alike;
      for (int64_t i = 0; i < images; ++i) {
        std::copy_n(panel, panels * stride, together.get() + i * panels * stride);
        alike.insert(alike.end(), first.begin(), first.end());
      }
      cmf::PanelGemm p = problem_of(z);
      p.panels = together.get();
      p.images = images;
      kernels.run(p, 0, plane, 0, groups, scratch.get());
      require_same(z, alike, problem + " isa=" + isa + text(" levels=", levels), "a batch");
    }
  }
}

// 1x1 convolutions of maps with any strides, and patches as a stem cuts them.
void test_pointwise_of_maps(Random& random, const std::vector<std::string>& isas) {
  const int64_t patch = random.chance(50) ? 1 : random.integer(2, 9), n = random.integer(1, 4);
  int64_t c = patch == 1 ? random_channels(random) : random.integer(1, 4);
  if (patch == 1 && random.chance(20)) c = strassen_channels(random);
  const int64_t c_out = random_channels(random);
  // Whole patches and something left over.
  const int64_t h = std::min<int64_t>(random_side(random), 20) * patch + random.integer(0, patch - 1);
  const int64_t w = std::min<int64_t>(random_side(random), 20) * patch + random.integer(0, patch - 1);
  const int64_t down = h / patch, across = w / patch, plane = down * across;
  const int64_t c_in = c * patch * patch;
  const Activation act = random.activation();
  const Strides xs = random_strides(random, {n, c, h, w}, 3, false);
  const Floats x = normals(random, xs.floats);
  const Floats weight =
      normals(random, c_out * c_in, 1.0f / std::sqrt(static_cast<float>(c_in)));
  const Floats bias = random.chance(80) ? normals(random, c_out) : Floats{};
  const Floats scale = scales(random, c_out), shift = normals(random, c_out);
  const std::string problem =
      text("pointwise of maps n=", n, " c=", c, " h=", h, " w=", w, " patch=", patch, " c_out=", c_out,
           " act=", cmf::kActivationNames[static_cast<int>(act)], bias.empty() ? " no bias" : "");
  std::vector<Expected> expected;
  for (int64_t i = 0; i < n * c_out * plane; ++i) {
    const int64_t image = i / (c_out * plane), co = i / plane % c_out, row = i % plane / across;
    Sum sum;
    sum.add(bias.empty() ? 0.0 : bias[co]);
    for (int64_t k = 0; k < c_in; ++k) {
      const int64_t dy = k / patch % patch, dx = k % patch;
      sum.add(static_cast<double>(weight[co * c_in + k]) *
              x[xs.at(image, k / (patch * patch), row * patch + dy, i % across * patch + dx)]);
    }
    expected.push_back(finish(sum.expected(), act, scale[co], shift[co], 0.0));
  }
  for (const std::string& isa : isas) {
    cmf::set_isa(isa);
    Floats first;
    for (int threads : {1, 2, 3}) {
      Floats z = untouched_floats(n * c_out * plane);
      cmf::Pointwise m;
      m.x = x.data();
      for (int axis = 0; axis < 4; ++axis) m.x_stride[axis] = xs.stride[axis];
      m.z = z.data();
      m.n = n;
      m.c = c;
      m.h = h;
      m.w = w;
      m.patch = patch;
      m.c_out = c_out;
      m.weight = weight.data();
      m.bias = data_or_null(bias);
      m.scale = scale.data();
      m.shift = shift.data();
      m.act = act;
      m.strassen_levels = 1;
      cmf::pointwise(m, threads);
      if (threads > 1) {
        require_same(z, first, problem + " isa=" + isa, text(threads, " threads"));
        continue;
      }
      for (int64_t i = 0; i < n * c_out * plane; ++i) {
        check(z[i], expected[i], problem + " isa=" + isa, i);
      }
      first = std::move(z);
    }
  }
}

struct BlockParameters {
  DepthwiseParameters spatial;
  Floats weight, bias, scale, shift;
};

// The definition in stack.h of one block on contiguous maps.
std::vector<Expected> block_expected(const BlockParameters& b, Activation act, const Floats& x,
                                     int64_t n, int64_t c, int64_t h, int64_t w, int64_t k) {
  std::vector<Expected> y(x.size()), z(x.size());
  for (int64_t i = 0; i < n * c * h * w; ++i) {
    const float* plane = x.data() + i / (h * w) * (h * w);
    y[i] = depthwise_at(b.spatial, act, k, h, w, i / (h * w) % c, i / w % h, i % w,
                        [&](int64_t row, int64_t col) {
                          return static_cast<double>(plane[row * w + col]);
                        });
  }
  for (int64_t i = 0; i < n * c * h * w; ++i) {
    const int64_t image = i / (c * h * w), co = i / (h * w) % c, pixel = i % (h * w);
    Sum sum;
    sum.add(b.bias.empty() ? 0.0 : b.bias[co]);
    for (int64_t ci = 0; ci < c; ++ci) {
      sum.add(b.weight[co * c + ci], y[(image * c + ci) * h * w + pixel]);
    }
    z[i] = finish(sum.expected(), act, b.scale[co], b.shift[co], 0.0);
  }
  return z;
}

// What lies around the band [r0, r1) x [c0, c1) of maps and is seen by it, in memory of exactly its size.
struct Window {
  int64_t top, bottom, left, right;  // of the maps
  Floats values;

  Window(const Floats& x, int64_t maps, int64_t h, int64_t w, int64_t k, int64_t r0, int64_t r1,
         int64_t c0, int64_t c1)
      : top(std::max<int64_t>(0, r0 - (k - 1) / 2)),
        bottom(std::min(h, r1 + k / 2)),
        left(std::max<int64_t>(0, c0 - (k - 1) / 2)),
        right(std::min(w, c1 + k / 2)) {
    for (int64_t i = 0; i < maps; ++i) {
      for (int64_t r = top; r < bottom; ++r) {
        const float* row = x.data() + (i * h + r) * w;
        values.insert(values.end(), row + left, row + right);
      }
    }
    values.shrink_to_fit();
  }
};

cmf::MixerBand band_of(const Window& window, Floats& z, int64_t n, int64_t c, int64_t h, int64_t w,
                       int64_t k, Activation act, const Floats& weight, const Floats& packed,
                       int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  const int64_t cols = window.right - window.left, plane = (window.bottom - window.top) * cols;
  cmf::MixerBand band;
  band.x = window.values.data() + (r0 - window.top) * cols + c0 - window.left;
  band.x_stride[0] = c * plane;
  band.x_stride[1] = plane;
  band.x_stride[2] = cols;
  band.above = r0 - window.top;
  band.below = window.bottom - r1;
  band.left = c0 - window.left;
  band.right = window.right - c1;
  band.z = z.data();
  band.n = n;
  band.c = c;
  band.h = r1 - r0;
  band.w = c1 - c0;
  band.k = k;
  band.block = packed.data();
  band.weight = weight.data();
  band.act = act;
  band.map_pixels = h * w;
  return band;
}

// Any part of a map, multiplied directly, has the bits of the whole; what lies between the channels of
// z stays as it was.
void test_band(Random& random, const Floats& x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k,
               Activation act, const Floats& weight, const Floats& packed, const Floats& whole,
               const std::string& problem) {
  const int64_t r0 = random.integer(0, h - 1), r1 = random.integer(r0 + 1, h);
  int64_t c0 = random.integer(0, w - 1), c1 = random.integer(c0 + 1, w);
  if (random.chance(50)) c0 = 0, c1 = w;
  const int64_t rows = r1 - r0, cols = c1 - c0, gap = random.integer(0, 20);
  const Window window(x, n * c, h, w, k, r0, r1, c0, c1);
  Floats z = untouched_floats(n * c * (rows * cols + gap)), expected = z;
  cmf::MixerBand band =
      band_of(window, z, n, c, h, w, k, act, weight, packed, r0, r1, c0, c1);
  band.z_stride[1] = rows * cols + gap;
  band.z_stride[0] = c * band.z_stride[1];
  band.strassen_levels = 0;
  cmf::mixer_band(band, random.integer(1, 3));
  for (int64_t i = 0; i < n * c; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(whole.data() + (i * h + r0 + r) * w + c0, cols,
                  expected.data() + i * (rows * cols + gap) + r * cols);
    }
  }
  require_same(z, expected, problem, text("a band of ", rows, " x ", cols, " at ", r0, ", ", c0));
}

// Rows from a first one on that begins a group of joined pixels, down to the map's end, have the bits of
// the whole map by Strassen's algorithm too.
void test_rows(const Floats& x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, Activation act,
               const Floats& weight, const Floats& packed, int64_t first, const Floats& whole,
               const std::string& problem) {
  const int64_t rows = h - first;
  const Window window(x, n * c, h, w, k, first, h, 0, w);
  Floats z = untouched_floats(n * c * rows * w), expected;
  cmf::MixerBand band = band_of(window, z, n, c, h, w, k, act, weight, packed, first, h, 0, w);
  band.z_stride[1] = rows * w;
  band.z_stride[0] = c * rows * w;
  band.strassen_levels = 1;
  cmf::mixer_band(band, 2);
  for (int64_t i = 0; i < n * c; ++i) {
    const float* plane = whole.data() + i * h * w;
    expected.insert(expected.end(), plane + first * w, plane + h * w);
  }
  require_same(z, expected, problem, text("rows from ", first, " on"));
}

void test_mixer(Random& random, const std::vector<std::string>& isas) {
  const int64_t k = random_kernel_size(random), depth = random.integer(1, 3);
  int64_t c = random_channels(random), h = random_side(random), w = random_side(random);
  const int64_t n = random.integer(1, 5);
  if (random.chance(15)) c = strassen_channels(random);
  h = std::max<int64_t>(1, std::min(h, 1500000 / (n * c * w * (c + k * k))));
  w = std::max<int64_t>(1, std::min(w, 1500000 / (n * c * h * (c + k * k))));
  const Activation act = random.activation();
  std::vector<BlockParameters> blocks;
  for (int64_t i = 0; i < depth; ++i) {
    blocks.push_back({depthwise_parameters(random, c, k),
                      normals(random, c * c, 1.0f / std::sqrt(static_cast<float>(c))),
                      random.chance(80) ? normals(random, c) : Floats{}, scales(random, c),
                      normals(random, c)});
  }
  const Floats x = normals(random, n * c * h * w);
  const std::string named =
      text("mixer n=", n, " c=", c, " h=", h, " w=", w, " k=", k, " depth=", depth, " act=",
           cmf::kActivationNames[static_cast<int>(act)]);

  for (const std::string& isa : isas) {
    const std::string problem = named + " isa=" + isa;
    cmf::set_isa(isa);
    std::vector<Floats> packed;
    std::vector<const float*> addresses, weights;
    for (const BlockParameters& b : blocks) {
      packed.push_back(untouched_floats(cmf::mixer_packed_floats(c, k)));
      cmf::mixer_pack({b.spatial.taps.data(), data_or_null(b.spatial.bias), b.spatial.scale.data(),
                       b.spatial.shift.data(), data_or_null(b.bias), b.scale.data(),
                       b.shift.data()},
                      c, k, packed.back().data());
      addresses.push_back(packed.back().data());
      weights.push_back(b.weight.data());
    }
    auto run = [&](const Floats& in, int64_t first_block, int64_t count, int threads,
                   int64_t images, int levels = 1) {
      Floats z = untouched_floats(n * c * h * w);
      cmf::MixerStack stack;
      stack.x = in.data();
      stack.z = z.data();
      stack.n = n;
      stack.c = c;
      stack.h = h;
      stack.w = w;
      stack.k = k;
      stack.blocks = addresses.data() + first_block;
      stack.weights = weights.data() + first_block;
      stack.strassen_levels = levels;
      stack.depth = count;
      stack.act = act;
      for (int64_t i = 0; i < n; i += images) {
        cmf::mixer_stack(stack, i, std::min(i + images, n), threads);
      }
      return z;
    };
    // One block by the definition; the whole stack, whatever its cut, is the blocks one by one.
    Floats chain = x;
    for (int64_t i = 0; i < depth; ++i) {
      const Floats in = chain;
      chain = run(in, i, 1, 1, n);
      if (i > 0 && random.chance(70)) continue;
      const std::vector<Expected> z = block_expected(blocks[i], act, in, n, c, h, w, k);
      for (int64_t at = 0; at < n * c * h * w; ++at) check(chain[at], z[at], problem, at);
    }
    for (int threads : {1, 2, 3}) {
      for (int64_t images : {n, int64_t{1}, int64_t{2}}) {
        if (images > n) continue;
        require_same(run(x, 0, depth, threads, images), chain, problem,
                     text(threads, " threads and ", images, " images a call"));
      }
    }
    test_band(random, x, n, c, h, w, k, act, blocks[0].weight, packed[0], run(x, 0, 1, 1, n, 0),
              problem);
    const int64_t joined = cmf::joined_pixels(c, c, 1) / std::gcd(cmf::joined_pixels(c, c, 1), w);
    const int64_t first = h / joined > 0 ? random.integer(0, h / joined - 1) * joined : 0;
    test_rows(x, n, c, h, w, k, act, blocks[0].weight, packed[0], first, run(x, 0, 1, 1, n),
              problem);
  }
}

void test_fingerprint(Random& random) {
  // Whole pieces, and matrices of which rows are sampled.
  const bool sampled = random.chance(50);
  const int64_t row = sampled ? random.integer(64, 700) : random.integer(0, 80);
  const int64_t rows = sampled ? static_cast<int64_t>(cmf::kWholeBytes) / row + random.integer(1, 300) : 0;
  const int64_t size = sampled ? row * rows : random.integer(0, 5000);
  const int64_t offset = random.integer(0, 7);
  std::vector<unsigned char> memory(static_cast<std::size_t>(size + offset)), other;
  for (unsigned char& byte : memory) byte = static_cast<unsigned char>(random.bits());
  other.assign(memory.begin() + offset, memory.end());
  const auto bytes = static_cast<std::size_t>(size);
  const cmf::Piece here = {memory.data() + offset, bytes, static_cast<std::size_t>(row)};
  const cmf::Piece copy = {other.data(), bytes, static_cast<std::size_t>(row)};
  const std::string problem = text("fingerprint of ", size, " bytes, rows of ", row, ", offset ", offset);
  const uint64_t hash = cmf::fingerprint(&here, 1);
  if (hash != cmf::fingerprint(&copy, 1)) throw Failure(problem + ": depends on the address");
  if (size == 0) return;
  // One byte of a whole piece, one row of a sampled one.
  const int64_t at = sampled ? random.integer(0, rows - 1) * row : random.integer(0, size - 1);
  for (int64_t i = 0; i < (sampled ? row : 1); ++i) other[static_cast<std::size_t>(at + i)] ^= 0x80;
  if (hash == cmf::fingerprint(&copy, 1)) throw Failure(problem + ": does not see a write");
}

}  // namespace

std::string test_kernels(const Options& options) {
  const std::vector<std::string> isas = cmf::usable_isas();
  Random random(options.seed);
  for (int64_t i = 0; i < options.problems; ++i) {
    // Each problem from a seed of its own: the stream of one never moves the next.
    Random own(random.bits());
    switch (i % 9) {
      case 0: case 3: case 6: test_depthwise(own, isas); break;
      case 8: test_pointwise_of_maps(own, isas); break;
      case 1: case 4: test_mixer(own, isas); break;
      case 2: case 5: test_panel_gemm(own, isas); break;
      default: test_epilogue(own, isas); test_fingerprint(own); break;
    }
  }
  std::string names;
  for (const std::string& isa : isas) {
    cmf::set_isa(isa);
    float sink = 0.0f;
    if (!(cmf::active_isa().peak(100, &sink) > 0.0)) throw Failure("peak: nothing done, isa=" + isa);
    names += " " + isa;
  }
  return text(options.problems, " problems right on", names, ", largest error ",
              static_cast<int>(100 * worst + 0.5), "% of its tolerance");
}

}  // namespace convmixer_fast_test
