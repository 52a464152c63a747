// What the stem's kernels take on the CPU, and the table of their implementations.
//
// The convolution z has a kernel of 7 x 7, stride 2 and padding 3, the pool a window of 3 x 3, stride 2 and padding 1.
// Maps are channels-last in memory. Parameters, statistics and sums are of the type that is computed in.
#pragma once

#include "../../types.h"

namespace ceit::i2t_cpu {

constexpr int kSide = 7, kStride = 2, kPadding = 3;
// Output channels that packed weights have side by side: (panels, in_channels * 7 * 7, kPanelChannels), the last filled
// up with zeros.
constexpr int kPanelChannels = 32;

struct Sizes {
  int64_t batch, in_channels, height, width;
  int64_t strides[4];  // of the image, in elements
  int64_t out_channels, panels;
  int64_t conv_height, conv_width, pooled_height, pooled_width;
};

struct Convolution {
  Sizes sizes;
  const void* image;
  const void* weight;  // packed
};

// out = the element of each window with the largest sign z, normalised where there is a norm: (z - mean) scale + shift.
// `indices` receives its place in the window, in rows of 3; `moments` mean and centred sum of squares of each row of z.
struct ForwardCall {
  Convolution convolution;
  const void* sign;  // (out_channels)
  const void* norm;  // (3, out_channels): mean, scale, shift; or null
  void* out;         // (B, pooled_height, pooled_width, out_channels)
  uint8_t* indices;  // likewise, or null
  void* moments;     // (B, conv_height, 2, out_channels), or null
};

// out = (x - mean) scale + shift, which may be in the place of x.
struct NormaliseCall {
  int64_t pixels, channels;
  const void* norm;  // (3, channels)
  const void* x;     // (pixels, channels)
  void* out;         // likewise
};

// Sums over each row of g and of g (x - mean).
struct SumsCall {
  int64_t rows, width, channels;
  const void* gradient;
  const void* x;
  const void* mean;  // (channels)
  void* sums;        // (rows, 2, channels)
};

// With the pooled gradient g at the places of the maxima, and zero elsewhere: dz = a (g - mean_g) + b (z - mean),
// the weight's gradient, which is a matmul of dz and the patches, and the sum of g (z - mean); z is computed again.
struct BackwardCall {
  Convolution convolution;
  const void* gradient;  // (B, pooled_height, pooled_width, out_channels)
  const uint8_t* indices;
  const void* coefficients;  // (4, out_channels): mean, a, b, mean_g
  int64_t parts;             // of the rows of all images, each with sums of its own
  void* grad_weight;         // (parts, panels, in_channels * 7 * 7, kPanelChannels)
  void* centred_sums;        // (parts, out_channels)
  void* grad_convolution;    // dz (B, conv_height, conv_width, out_channels), or null
};

// Each runs a range of tasks: rows of the result (forward, sums), pixels (normalise), parts (backward).
struct Kernels {
  Kernel<ForwardCall> forward;
  Kernel<NormaliseCall> normalise;
  Kernel<SumsCall> sums;
  Kernel<BackwardCall> backward;
};

}  // namespace ceit::i2t_cpu
