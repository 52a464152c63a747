// LeFF's stages as functions of tensors: what calls.h describes, and what the pipelines are made of.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "calls.h"

namespace ceit::leff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What sums and parameters are kept in.
inline ScalarType real_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of an activation's number; an error for any other.
Activation checked_activation(int64_t index);

void depthwise(Tensor in, OptionalTensor norm, int64_t first, Tensor taps, OptionalTensor bias, int64_t second,
               int64_t side, int64_t height, int64_t width, Tensor out, OptionalTensor moments);
void depthwise_backward(Tensor g, Tensor z2, OptionalTensor gradient2, Tensor taps, Tensor z1, OptionalTensor norm1,
                        int64_t first, int64_t side, int64_t height, int64_t width, OptionalTensor sums1,
                        OptionalTensor grad_taps);
void moments(Tensor in, int64_t tokens, Tensor moments);
void activate(Tensor in, OptionalTensor norm, int64_t kind, int64_t tokens, Tensor out);
void activate_backward(Tensor g, Tensor z, OptionalTensor norm, int64_t kind, int64_t tokens, Tensor dz,
                       OptionalTensor out, Tensor sums);
void sums(Tensor g, OptionalTensor z, OptionalTensor norm, int64_t tokens, Tensor sums);
void gradient(Tensor g, OptionalTensor z, OptionalTensor gradient, int64_t tokens, Tensor out);
void finish(Tensor z, OptionalTensor norm, Tensor x, OptionalTensor residual, int64_t tokens, Tensor out);
void transpose(Tensor in, Tensor out);
// A matrix (columns, rows) of the columns of some rows: whole lines of the cache from one row to the next, and no large
// power of two of them, which would share few sets of it.
inline int64_t turned_stride(int64_t rows) {
  const int64_t lines = (rows + 15) / 16;
  return (lines % 4 == 0 ? lines + 1 : lines) * 16;
}
void transpose_rows(const float* in, int64_t rows, int64_t columns, float* out);

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
// The array of a norm (see calls.h) of the statistics of all parts, or of running ones without parts. `total` (1,)
// receives the tokens of all parts.
void norm_array(const PartMoments& parts, const NormVectors& vectors, const Tensor& out, const OptionalTensor& total);

// From the sums (P, 2, channels) of a norm's gradient g and of g (z - mean): the gradient array (see calls.h), and
// `vectors` (3, channels), the gradients of the bias ahead of the norm and of the norm's weight and bias. `count` (1,)
// is the number of tokens that the batch statistics were taken of; without it they are running ones. Without a norm
// `vectors` are the sums.
void gradient_array(Tensor sums, OptionalTensor norm, OptionalTensor count, OptionalTensor vectors,
                    OptionalTensor gradient);

// The pipelines, `images` images at a time. z has no prefix tokens where it is not said.

// out (B, rows, O) of inference of tokens x (B, rows, C), of the type that is computed in. parameters: of each of three
// convolutions weight, bias, norm weight, norm bias, running mean and running variance; or `packed`, what `pack` made
// of them. eps: of the norms. sizes: C, E, O, side of the kernel, both activations, height, width.
void infer(Tensor x, std::vector<OptionalTensor> parameters, OptionalTensor packed, OptionalTensor residual,
           std::vector<double> eps, std::vector<int64_t> sizes, Tensor out);
Tensor pack(Tensor like, std::vector<OptionalTensor> parameters, std::vector<double> eps, std::vector<int64_t> sizes);
// z1 (B, rows, E) of x (B, rows, C), with the moments of its tokens where they are wanted.
Tensor expand(Tensor x, Tensor weight, OptionalTensor bias, int64_t tokens, OptionalTensor moments);
// z3 (B, tokens, O) of z2 (B, tokens, E), with its moments where they are wanted.
Tensor contract(Tensor z2, OptionalTensor norm, int64_t activation, Tensor weight, OptionalTensor bias, int64_t images,
                OptionalTensor moments);
// g2, the gradient of the second norm's result, with its sums for each image; returns that of the weight (O, E) in the
// type of the sums, without an element unless it is wanted.
Tensor contract_backward(Tensor dz3, Tensor weight, Tensor z2, OptionalTensor norm, int64_t activation, int64_t images,
                         bool need_weight, Tensor g2, Tensor sums);
// From g1 (B, rows, E), which may be overwritten: the gradients of x (B, rows, C) and of the weight (E, C), without an
// element unless they are wanted. z1 has the rows of x.
std::tuple<Tensor, Tensor> expand_backward(Tensor g1, Tensor z1, OptionalTensor gradient, Tensor x, Tensor weight,
                                           int64_t tokens, int64_t images, bool need_x, bool need_weight);

}  // namespace ceit::leff
