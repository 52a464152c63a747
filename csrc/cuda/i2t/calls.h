// What the registered operators hand to the launchers: pointers and sizes, checked, in no header of PyTorch.
#pragma once

#include "../../types.h"

namespace ceit {
struct Fp16;
}  // namespace ceit

namespace ceit::i2t {

// How a warp multiplies matrices (mma.h).
template <class T>
struct HalfMma;
struct Tf32Mma;
template <class T>
struct ScalarMma;

constexpr int64_t kPackedPerChannel = 7 * 8 * 4;  // weights as the kernels read them

struct Problem {
  int batch, channels, height, width;
  int64_t stride_batch, stride_channel, stride_row, stride_column;  // of the image, in elements
  int conv_height, conv_width, pooled_height, pooled_width, out_channels;
  int64_t pooled_elements() const { return int64_t(batch) * pooled_height * pooled_width * out_channels; }
};

struct Call {
  Problem problem;
  const void* image;
  const void *weight, *gamma, *beta;  // float32, or float64 where that is computed in; gamma and beta may be null
  void *mean, *variance;              // likewise; written by a training forward, else read
  void* packed;                       // scratch: the weights as the kernels read them
  double eps;
  bool training;
  void* stream;
};

struct ForwardCall : Call {
  void* moments;  // scratch, for training
  void* out;
  uint8_t* indices;  // or null
  int rows_per_block;
  void *running_mean, *running_variance;  // averaged in training, or null
  int64_t* batches;                       // counted beside them, or null
  bool running_in_acc;                    // their dtype: that of sums, or that of the result
  double momentum, unbiased;              // weight of the batch, and what makes its variance that of a population
};

struct BackwardCall : Call {
  const void* gradient;
  const uint8_t* indices;
  void* sums;  // scratch
  void *grad_weight, *grad_gamma, *grad_beta;
  void* grad_image;  // or null
  int blocks;
};

// Scratch elements of a training forward: count, mean and squares of every warp side by side, 14 pooled columns a
// block.
inline int64_t moments_elements(const Problem& s, int rows_per_block) {
  const int64_t blocks = s.batch * ceil_div(s.pooled_width, 14) * ceil_div(s.pooled_height, rows_per_block);
  return 2 * blocks * (1 + 2 * s.out_channels);
}

// Scratch elements of a backward, at most: see GradientSums in backward.h.
inline int64_t sums_elements(const Problem& s, int blocks) {
  const int64_t weights = int64_t(s.channels) * 7 * 7;
  return blocks * (2 * weights * s.out_channels + weights * (s.out_channels / 16) + s.out_channels);
}

// Mma is one of the structs of mma.h, In is the type of the image.
template <class Mma, class In>
void compute(const ForwardCall& call);
template <class Mma, class In>
void compute(const BackwardCall& call);

}  // namespace ceit::i2t
