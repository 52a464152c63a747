// LeFF's training as the dispatcher sees it.
#pragma once

#include <string>
#include <vector>

#include "../../tensors.h"

namespace ceit::leff {

// Fills `out` and returns what backward needs: z1, z2, z3, the arrays of the three norms and the count of tokens, as
// the registered operator does.
//
// x: tokens (B, rows, C) in the type that is computed in; `prefix` is x in that of out. parameters: for each layer the
// convolution's weight (*, *, k, k) and bias, of the pointwise ones in that type as well, and all others in the type of
// sums: the norm's weight and bias, running mean and variance. modes: of the norms, NORM_MODES of
// ceit_kernels/leff/arguments.py: 0 for none, 1 for running statistics, 2 for those of the batch. sizes: both
// activations, height, width. group: the name of the processes whose batches are one; empty for this
// one alone.
std::vector<Tensor> train(Tensor x, std::vector<OptionalTensor> parameters, OptionalTensor residual, Tensor prefix,
                          std::vector<double> eps, std::vector<int64_t> modes, std::vector<int64_t> sizes,
                          std::string group, Tensor out);

// The gradients of x, whose prefix rows are zero, and of weight, bias, norm weight and norm bias of each layer; without
// an element unless they are wanted, which bits of `needs` say in that order, and `need_x` of x. saved: what `train`
// returned. The rest is as for `train`.
std::vector<Tensor> train_backward(Tensor dout, Tensor x, std::vector<OptionalTensor> parameters,
                                   std::vector<Tensor> saved, std::vector<int64_t> modes, std::vector<int64_t> sizes,
                                   std::string group, bool need_x, int64_t needs);

}  // namespace ceit::leff
