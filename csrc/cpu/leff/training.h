// What LeFF's training is made of: matmuls image by image, whose results are taken up while they are in cache, and the
// arrays of the norms (see calls.h) of what the kernels summed up.
#pragma once

#include <string>
#include <tuple>
#include <vector>

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
  ScalarType of_x;  // the gradient's type: that of x, or of sums
  bool need_x, need_weight;
};
// The gradients of x (B, rows, C) and of the weight (E, C), without an element unless they are wanted.
std::tuple<Tensor, Tensor> expand_backward(const ExpandBackward& call);

// Mean and centred sum of squares (P, 2, channels) of P parts, of as many tokens each, or of `counts` (P,).
struct PartMoments {
  OptionalTensor moments, counts;
  int64_t tokens = 0;
};
// What a norm computes with beside the statistics of a batch.
struct NormVectors {
  OptionalTensor running_mean, running_variance, weight, bias;
  double eps = 0;
};
// The array (5, channels) of a norm, of the statistics of all parts, or of running ones without parts. `total` (1,)
// receives the tokens of all parts.
void norm_array(const PartMoments& parts, const NormVectors& vectors, const Tensor& out, const OptionalTensor& total);

// From the sums (P, 2, channels) of a norm's gradient g and of g (z - mean): the gradient array (4, channels), and
// `vectors` (3, channels), the gradients of the bias ahead of the norm and of the norm's weight and bias. `count` (1,)
// is the number of tokens that the batch statistics were taken of; without it they are running ones. Without a norm
// `vectors` are the sums.
void gradient_array(const Tensor& sums, const OptionalTensor& norm, const OptionalTensor& count,
                    const OptionalTensor& vectors, const OptionalTensor& gradient);

// Fills `out` and returns what backward needs: z1, z2, z3, the arrays of the three norms and the count of tokens, as
// the registered operator does.
//
// x: tokens (B, rows, C) in the type that is computed in; `prefix` is x in that of out, or out where its prefix rows
// are there already. parameters: for each layer the convolution's weight (*, *, k, k) and bias, of the pointwise ones
// in any type, which is rounded, and all others in the type of sums: the norm's weight and bias, running mean and
// variance. modes: of the norms, NORM_MODES of ceit_kernels/leff/arguments.py: 0 for none, 1 for running statistics, 2
// for those of the batch. sizes: both activations, height, width. group: the name of the processes whose batches are
// one; empty for this one alone.
std::vector<Tensor> train(Tensor x, std::vector<OptionalTensor> parameters, OptionalTensor residual, Tensor prefix,
                          std::vector<double> eps, std::vector<int64_t> modes, std::vector<int64_t> sizes,
                          std::string group, Tensor out);

// The gradients of x, in the type `of_x`, whose prefix rows are zero, and of weight, bias, norm weight and norm bias of
// each layer; without an element unless they are wanted, which bits of `needs` say in that order, and `need_x` of x.
// saved: what `train` returned. The rest is as for `train`.
std::vector<Tensor> train_backward(Tensor dout, Tensor x, std::vector<OptionalTensor> parameters,
                                   std::vector<Tensor> saved, std::vector<int64_t> modes, std::vector<int64_t> sizes,
                                   std::string group, ScalarType of_x, bool need_x, int64_t needs);

}  // namespace ceit::leff
