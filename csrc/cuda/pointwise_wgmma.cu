// How are channels mixed by the wgmma instruction, which sm_90 alone has? CUTLASS 3.x's loop, with the
// rest of the half as a tree of visitors in its epilogue,
//
//   multiply_add(scale, activate(add(sums, bias)), shift)
//
// bias, scale and shift being rows that are the same for all of a tile's rows. CUTLASS is headers at
// build time. Two tiles: 128 x 256 x 64, whose two groups of warps share a tile's rows, reads 48 bytes
// a clock from L2 at the full rate, and clusters of two tiles share what they have in common;
// 64 x 128 x 64, two groups of warps with a tile each, one ending its tile while the other multiplies,
// makes four times as many where there are few.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <string>

#include "activation.cuh"
#include "status.h"

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "cutlass/functional.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/kernel_hardware_info.hpp"

namespace convmixer_fast::cuda {
namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// A visitor's function: one branch for all elements of a fragment, and every activation in one kernel.
struct WhichActivation {
  Activation act;
};

template <class T>
struct Activate {
  using Arguments = WhichActivation;
};

template <int kElements>
struct Activate<cutlass::Array<float, kElements>> {
  using Arguments = WhichActivation;

  CUTLASS_HOST_DEVICE cutlass::Array<float, kElements> operator()(
      const cutlass::Array<float, kElements>& h, const Arguments& arguments) const {
    switch (arguments.act) {
      case Activation::gelu: return each<Activation::gelu>(h);
      case Activation::relu: return each<Activation::relu>(h);
      case Activation::silu: return each<Activation::silu>(h);
      case Activation::hardswish: return each<Activation::hardswish>(h);
      case Activation::identity: break;
    }
    return h;
  }

 private:
  template <Activation kAct>
  CUTLASS_HOST_DEVICE static cutlass::Array<float, kElements> each(
      const cutlass::Array<float, kElements>& h) {
    cutlass::Array<float, kElements> out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
#ifdef __CUDA_ARCH__
      out[i] = activate<kAct>(h[i]);
#endif
    }
    return out;
  }
};

template <class Element, class Tile, class MainLoop, class Epilogue>
struct Kernel {
  using Cluster = Shape<_2, _1, _1>;
  static constexpr int kAlignment = 16 / sizeof(Element);
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  using Row = fusion::Sm90RowBroadcast<0, Tile, float>;
  using Sum = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, kRound>,
                              fusion::Sm90AccFetch, Row>;
  using Active = fusion::Sm90EVT<fusion::Sm90Compute<Activate, float, float, kRound>, Sum>;
  using Tree = fusion::Sm90EVT<
      fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Element, float, kRound>, Row, Active, Row>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::RowMajor, kAlignment, Element, cutlass::layout::RowMajor, kAlignment, Epilogue,
      Tree>::CollectiveOp;
  using CollectiveMainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor,
      kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      MainLoop>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
      Shape<int, int, int, int>, CollectiveMainLoop, CollectiveEpilogue>>;

  static std::string launch(const Pointwise& p, const char* name, int capability, cudaStream_t stream) {
    cutlass::KernelHardwareInfo hardware;
    cudaError_t status = cudaGetDevice(&hardware.device_id);
    if (status == cudaSuccess) {
      status = cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount,
                                      hardware.device_id);
    }
    if (status != cudaSuccess) return reason(status, "asking for the device", name, p, capability);

    const int m = static_cast<int>(p.m), n = static_cast<int>(p.n), k = static_cast<int>(p.k);
    const auto* a = static_cast<const Element*>(p.a);
    const auto* w = static_cast<const Element*>(p.w);
    auto* d = static_cast<Element*>(p.d);
    using StrideA = typename Gemm::GemmKernel::StrideA;
    using StrideB = typename Gemm::GemmKernel::StrideB;
    using StrideD = typename Gemm::GemmKernel::StrideD;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {a, StrideA{p.m > 1 ? p.a_stride : p.k, _1{}, 0}, w, StrideB{p.k, _1{}, 0}},
        {{
             {p.scale},                                           // row
             {{{}, {p.bias}, {}}, {p.act}},                       // activate(sums + row)
             {p.shift},                                           // row
             {},                                                  // multiply_add
         },
         nullptr,
         {},
         d,
         StrideD{p.n, _1{}, 0}},
        hardware};

    if (Gemm::get_workspace_size(arguments) != 0 ||
        Gemm::can_implement(arguments) != cutlass::Status::kSuccess) {
      return std::string(name) + " (" + describe(p) + ", sm_" + std::to_string(capability) +
             "): CUTLASS does not take this problem";
    }
    Gemm gemm;
    const cutlass::Status done = gemm.run(arguments, nullptr, stream);
    if (done == cutlass::Status::kSuccess) return "";
    status = cudaGetLastError();
    if (status != cudaSuccess) return reason(status, "the launch", name, p, capability);
    return std::string(name) + " (" + describe(p) + ", sm_" + std::to_string(capability) +
           "): the launch failed with " + cutlassGetStatusString(done);
  }
};

template <class Element>
using Large = Kernel<Element, Shape<_128, _256, _64>, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                     cutlass::epilogue::TmaWarpSpecializedCooperative>;
template <class Element>
using Small = Kernel<Element, Shape<_64, _128, _64>, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                     cutlass::epilogue::TmaWarpSpecialized>;

bool serves(int capability) { return capability == 90; }

std::string refusal(const Pointwise& p, int capability) {
  if (!serves(capability)) return "wgmma kernels need sm_90";
  if (p.type == Type::tf32) return "wgmma kernels are compiled for bfloat16 and float16";
  if (p.m == 0 || p.n == 0) return "";
  if (p.k == 0) return "there is nothing to sum";
  constexpr int64_t kInt = std::numeric_limits<int>::max();
  if (p.m > kInt - 256 || p.n > kInt - 256 || p.k > kInt - 256) return "a size passes 2^31 - 257";
  if (p.k % 8 != 0 || p.n % 8 != 0 || (p.m > 1 && p.a_stride % 8 != 0)) {
    return "the copy engine wants rows of a multiple of 16 bytes";
  }
  uintptr_t addresses = 0;
  for (const void* address : {p.a, p.w, static_cast<const void*>(p.bias),
                              static_cast<const void*>(p.scale), static_cast<const void*>(p.shift),
                              static_cast<const void*>(p.d)}) {
    addresses |= reinterpret_cast<uintptr_t>(address);
  }
  if (addresses % 16 != 0) return "the copy engine wants addresses at multiples of 16 bytes";
  return "";
}

template <class Element>
std::string launch(const Pointwise& p, int capability, cudaStream_t stream) {
  if (few_outputs(p)) return Small<Element>::launch(p, "pointwise_wgmma 64x128", capability, stream);
  return Large<Element>::launch(p, "pointwise_wgmma 128x256", capability, stream);
}

std::string launch(const Pointwise& p, int capability, void* stream) {
  if (const std::string why = refusal(p, capability); !why.empty()) {
    return "pointwise_wgmma (" + describe(p) + ", sm_" + std::to_string(capability) + "): " + why;
  }
  if (p.m == 0 || p.n == 0) return "";
  const auto queue = static_cast<cudaStream_t>(stream);
  return p.type == Type::bf16 ? launch<cutlass::bfloat16_t>(p, capability, queue)
                              : launch<cutlass::half_t>(p, capability, queue);
}

}  // namespace

const Family& wgmma_family() {
  static const Family family{"wgmma", serves, refusal, launch};
  return family;
}

}  // namespace convmixer_fast::cuda
