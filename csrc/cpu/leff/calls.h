// What LeFF's kernels between the matmuls take on the CPU, and the table of their implementations.
//
// Tensors are contiguous, (B, rows, channels); of an image's rows the last `tokens` are the tokens of the image, those
// before are prefix tokens. `norm` arrays have 5 rows of channels (mean, variance, reciprocal deviation, scale, shift),
// `gradient` arrays 4 (mean, a, b, mean_g: the gradient of a norm's input is a (g - mean_g) + b (z - mean)).
// They, taps, biases and sums are of the type that is accumulated in.
#pragma once

#include "../../types.h"

namespace ceit::leff {

struct Shape {
  int64_t images, tokens, channels;
};

// A tensor of `rows` rows an image.
struct Map {
  void* data = nullptr;
  int64_t rows = 0;
};

// Channels of a task: what stays in the first level of cache for a few rows of tokens.
constexpr int kTileChannels = 64;
// Rows of a task where there is nothing to sum down the rows.
constexpr int kTileRows = 32;
// Tokens that are fetched ahead: a task's channels of two tokens are too far apart for the processor to see a stream.
constexpr int kPrefetch = 16;
// Channels of a row that are fetched ahead, where so many rows pass by that the processor does not see their streams.
constexpr int kPrefetchChannels = 64;

inline int64_t channel_tiles(const Shape& shape) { return shape.images * ceil_div(shape.channels, kTileChannels); }
inline int64_t row_tiles(const Shape& shape, int64_t rows) { return shape.images * ceil_div(rows, kTileRows); }

// out = second(taps * first(norm in) + bias), and the mean and centred sum of squares of each image and channel; of the
// image's rows from `top` to `bottom`, which are all that out has.
struct DepthwiseCall {
  Shape shape;
  int height, width, side;
  int top, bottom;
  Map in;
  const void* norm;
  Activation first;
  const void* taps;  // (side * side, channels)
  const void* bias;
  Activation second;
  Map out;
  void* moments;  // (B, 2, channels)
};

// From the gradient g2 of the second norm's result: that of z2, of the taps, and g1 = (taps transposed * dz2) times the
// slope of the activation at norm1 z1, with the sums of g1 and of g1 (z1 - mean). g1 takes the place of g2.
struct DepthwiseBackwardCall {
  Shape shape;
  int height, width, side;
  Map g, z2;  // the prefix tokens of g are set to zero
  const void* gradient2;
  const void* taps;
  Map z1;
  const void* norm1;
  Activation first;
  void* sums1;      // (B, 2, channels)
  void* grad_taps;  // (B, side * side, channels)
};

struct MomentsCall {
  Shape shape;
  Map in;
  void* moments;
};

// out = activation(norm in), without prefix tokens.
struct ActivateCall {
  Shape shape;
  Map in;
  const void* norm;
  Activation activation;
  Map out;
};

// In the place of g: g times the slope of the activation at norm z, with the sums of that and of that times (z - mean).
struct ActivateBackwardCall {
  Shape shape;
  Map g, z;
  const void* norm;
  Activation activation;
  void* sums;
  void* activated;  // activation(norm z) of one image, of channels from `first` on in rows `stride` apart; or null
  int64_t first, stride;
};

// Sums of g and of g (z - mean), for each image and channel; of g alone without z.
struct SumsCall {
  Shape shape;
  Map g, z;
  const void* norm;
  void* sums;
};

// out = a (g - mean_g) + b (z - mean), or g; prefix tokens of out are set to zero. Of the channels from `first` to
// `last`.
struct GradientCall {
  Shape shape;
  Map g, z;
  const void* gradient;
  Map out;
  int64_t first, last;
};

// out = norm z + residual; prefix tokens are those of x, + residual. x, residual and out are of one type.
struct FinishCall {
  Shape shape;
  Map z;
  const void* norm;
  Map x;
  const void* residual;
  Map out;
};

// Each runs a range of its call's tasks: channel_tiles (depthwise to sums) or row_tiles (the others).
struct Kernels {
  Kernel<DepthwiseCall> depthwise;
  Kernel<DepthwiseBackwardCall> depthwise_backward;
  Kernel<MomentsCall> moments;
  Kernel<ActivateBackwardCall> activate_backward;
  Kernel<SumsCall> sums;
  Kernel<ActivateCall> activate;
  Kernel<GradientCall> gradient;
  Kernel<FinishCall> finish;
  Kernel<FinishCall> finish_in_float;  // z of 16 bits, the rest float
};

}  // namespace ceit::leff
