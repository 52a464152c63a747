// What LeFF's stages between the matrix products take on the CPU, and the table of their implementations.
//
// Tensors are contiguous, (B, rows, channels); of an image's rows the last `tokens` are the tokens of the image, those
// before are prefix tokens. `norm` arrays have 5 rows of channels (mean, variance, reciprocal deviation, scale, shift),
// `gradient` arrays 4 (mean, a, b, c: the gradient of a norm's input is a g + b (z - mean) + c), as in
// ceit_kernels/leff/kernels. They, taps, biases and sums are of the type that is computed in.
#pragma once

#include <cstdint>

#include "../activation.h"

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
constexpr int kBlock = 64;
// Rows of a task where there is nothing to sum down the rows.
constexpr int kRows = 32;
// Tokens that are fetched ahead: a task's channels of two tokens are too far apart for the processor to see a stream.
constexpr int kPrefetch = 16;

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

// A matrix of an image's tokens and some channels.
struct Part {
  void* data = nullptr;
  int64_t stride = 0, channel = 0;  // the first of the channels that it has
};

// dz = g times the slope of the activation at norm z, with the sums of dz and dz (z - mean); out or `part`, which is
// for one image, is activation(norm z).
struct ActivateBackwardCall {
  Shape shape;
  Map g, z;
  const void* norm;
  Activation activation;
  Map dz, out;
  Part part;
  void* sums;
};

// Sums of g and of g (z - mean), for each image and channel; of g alone without z.
struct SumsCall {
  Shape shape;
  Map g, z;
  const void* norm;
  void* sums;
};

// out = a g + b (z - mean) + c, or g; prefix tokens of out are set to zero. Of the channels from `first` to `last`.
struct GradientCall {
  Shape shape;
  Map g, z;
  const void* gradient;
  Map out;
  Part part;  // instead of out, for one image, without prefix tokens
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

struct TransposeCall {
  int64_t rows, columns;
  const void* in;
  void* out;
  int64_t out_stride;  // elements from one of its rows, a column of in, to the next
};

template <class Call>
using Kernel = void (*)(const Call&, int64_t begin, int64_t end);

// Each runs a range of its call's tasks: pairs of an image and a block of channels (depthwise to sums), blocks of rows
// of all images (the others).
struct Kernels {
  Kernel<DepthwiseCall> depthwise;
  Kernel<DepthwiseBackwardCall> depthwise_backward;
  Kernel<MomentsCall> moments;
  Kernel<ActivateCall> activate;
  Kernel<ActivateBackwardCall> activate_backward;
  Kernel<SumsCall> sums;
  Kernel<GradientCall> gradient;
  Kernel<FinishCall> finish;
  Kernel<FinishCall> finish_in_float;  // z of 16 bits, the rest float
  Kernel<TransposeCall> transpose;
};

enum class Type { float32, bfloat16, float64 };

}  // namespace ceit::leff
