// LeFF's matmuls in training, image by image: what a GEMM makes is taken up while it is in cache.
#pragma once

#include <tuple>

#include "../../tensors.h"
#include "calls.h"

namespace ceit::leff {

// z1 (B, rows, E) of x (B, rows, C), with the moments (B, 2, E) of its tokens where they are wanted.
Tensor expand(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t tokens,
              const OptionalTensor& moments);

// z3 (B, tokens, O) of z2 (B, tokens, E), with the moments (B, 2, O) where they are wanted.
Tensor contract(const Tensor& z2, const OptionalTensor& norm, Activation activation, const Tensor& weight,
                const OptionalTensor& bias, const OptionalTensor& moments);

struct ContractBackward {
  Tensor dz3, weight, z2;
  OptionalTensor norm;
  Activation activation;
  bool need_weight;
  Tensor g2, sums;  // written: the gradient of the second norm's result, and its sums for each image
};
// The gradient of the weight (O, E) in the type of sums, without an element unless it is wanted.
Tensor contract_backward(const ContractBackward& call);

struct ExpandBackward {
  Tensor g1, z1;  // (B, rows, E); g1 is overwritten
  OptionalTensor gradient;
  Tensor x, weight;
  int64_t tokens;
  bool need_x, need_weight;
};
// The gradients of x (B, rows, C) and of the weight (E, C), without an element unless they are wanted.
std::tuple<Tensor, Tensor> expand_backward(const ExpandBackward& call);

}  // namespace ceit::leff
