// The arrays of LeFF's norms (see calls.h), of what its kernels summed up.
#pragma once

#include "../../tensors.h"

namespace ceit::leff {

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

}  // namespace ceit::leff
