// The activations, shared by the CPU and the CUDA kernels. The order is the number that Python passes.
#pragma once

namespace convmixer_fast {

enum class Activation : int { gelu = 0, relu, silu, hardswish, identity };
inline constexpr const char* kActivationNames[] = {"gelu", "relu", "silu", "hardswish", "identity"};
inline constexpr int kActivations = 5;

}  // namespace convmixer_fast
