#pragma once

namespace ceit {

// In the order of ACTIVATIONS in ceit_kernels/leff/arguments.py.
enum class Activation { gelu, gelu_tanh, silu, relu, hardswish, identity };

}  // namespace ceit
