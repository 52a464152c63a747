// The stem's forward pass as a function of tensors.
#pragma once

#include "../../tensors.h"

namespace ceit::i2t_cpu {

// out (B, H', W', channels) of an image; calls.h says more.
void forward(Tensor image, Tensor weight, Tensor sign, OptionalTensor norm, Tensor out, OptionalTensor indices,
             OptionalTensor moments);

}  // namespace ceit::i2t_cpu
