// What the kernels of convolutional layers take on the CPU, and the tables of their implementations.
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

// out = activation(rows * weights + shift), of pixels `begin` to `end` of a row of the result, all of whose taps lie
// within the map.
struct DirectCall {
  int side;
  int64_t line, step;              // elements of a row that a pixel meets, and from one pixel to the next
  const void* rows[kLargestSide];  // what the first pixel meets of them
  int64_t columns;
  const void *weights, *shift;  // (side * line, columns) and (columns,), of the type accumulated in
  Activation activation;
  void* out;  // (pixels, columns)
};

// data = activation(data + added), elements `begin` to `end`.
struct ActivateCall {
  Activation activation;
  const void* added;  // or null
  void* data;
};

// out = activation(upsampled x), bilinear between the centres of pixels, rows `begin` to `end` of the result.
struct UpsampleCall {
  int64_t height, width, channels;  // of x
  int factor;
  Activation activation;
  const void* x;
  void* out;
};

// A map (height, width, channels) that is upsampled to the size of another one.
struct Upsampled {
  const void* x;
  int64_t height, width;
};
constexpr int kMostUpsampled = 7;

// out = activation(out + the upsampled maps), pixels `begin` to `end` of the result, of which out has these alone.
struct AddUpsampledCall {
  int64_t height, width, channels;  // of the result
  int count;
  Upsampled maps[kMostUpsampled];
  Activation activation;
  void* out;
};

// sums (channels,) of rows `begin` to `end`, in the type accumulated in.
struct SumCall {
  int64_t channels;
  const void* rows;
  void* sums;
};

// gates = sigmoid(x), or hardsigmoid(x), of channels `begin` to `end`; gates are of the type accumulated in.
struct GateCall {
  bool hard;
  const void* x;
  void* gates;
};

// out = rows * gates, of rows `begin` to `end`.
struct ScaleCall {
  int64_t channels;
  const void *rows, *gates;
  void* out;
};

struct Kernels {
  Kernel<ActivateCall> activate;
  Kernel<SumCall> sum;
  Kernel<GateCall> gate;
  Kernel<ScaleCall> scale;
  Kernel<UpsampleCall> upsample;
  Kernel<AddUpsampledCall> add_upsampled;
};

}  // namespace ceit::convnet
