// What the kernels of convolutional layers take on the CPU, and the table of their implementations.
#pragma once

#include "../../types.h"

namespace ceit::convnet {

constexpr int kLargestSide = 7;

// out = activation(taps * rows + shift), of pixels `begin` to `end` of a row of the result.
struct DepthwiseCall {
  int64_t channels, width;  // of the map that is read
  int side, stride, padding;
  const void* rows[kLargestSide];  // (width, channels), of the map that the taps meet; null outside of it
  const void *taps, *shift;        // (side * side, channels) and (channels,), of the type accumulated in
  Activation activation;
  void* out;  // (end - begin, channels)
};

// Elements `begin` to `end`, in their place.
struct ActivateCall {
  Activation activation;
  void* data;
};

struct Kernels {
  Kernel<DepthwiseCall> depthwise;
  Kernel<ActivateCall> activate;
};

}  // namespace ceit::convnet
