#pragma once

#include "calls.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {

// For T float, Bf16 and double.
template <class T>
void depthwise(const DepthwiseCall& call, int64_t begin, int64_t end);
template <class T>
void depthwise_backward(const DepthwiseBackwardCall& call, int64_t begin, int64_t end);

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
