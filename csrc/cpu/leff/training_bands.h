// The pipelines of training in float32, image by image: what a product makes is taken up while it is in cache.
#pragma once

#include <tuple>

#include "stages.h"

namespace ceit::leff {

// Whether they serve tensors like this one.
bool has_bands(const Tensor& like);

// As in stages.h.
Tensor expand_by_bands(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t tokens,
                       const OptionalTensor& moments);
Tensor contract_by_bands(const Tensor& z2, const OptionalTensor& norm, int64_t activation, const Tensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& moments);
Tensor contract_backward_by_bands(const Tensor& dz3, const Tensor& weight, const Tensor& z2, const OptionalTensor& norm,
                                  int64_t activation, bool need_weight, const Tensor& g2, const Tensor& sums);
std::tuple<Tensor, Tensor> expand_backward_by_bands(const Tensor& g1, const Tensor& z1, const OptionalTensor& gradient,
                                                    const Tensor& x, const Tensor& weight, int64_t tokens, bool need_x,
                                                    bool need_weight);

}  // namespace ceit::leff
