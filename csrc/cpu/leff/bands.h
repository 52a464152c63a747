// LeFF's inference on one image, in float32 or bfloat16; its hidden tokens go from a product to the convolution and to the
// next product while they are in cache.
#pragma once

#include <algorithm>

#include "../panels/panels.h"
#include "calls.h"

namespace ceit::leff {

template <class T>
struct Bands {
  int64_t channels, hidden, outputs, prefix;
  int height, width, side;
  Activation first, second;
  panels::Call<T> expanding, contracting;  // but for the rows
  const float *taps, *bias2;

  // Of weights that are packed in panels; checks what it is given.
  Bands(int64_t channels, int64_t prefix, int64_t height, int64_t width, int64_t outputs,
        const torch::stable::Tensor& weight1, const torch::stable::Tensor& bias1, const torch::stable::Tensor& taps,
        const torch::stable::Tensor& bias2, const torch::stable::Tensor& weight3, const torch::stable::Tensor& bias3,
        int64_t first, int64_t second);

  int64_t tokens() const { return int64_t(height) * width; }
  // Elements of an image's memory.
  int64_t expanded_size() const { return tokens() * hidden; }
  int64_t memory() const { return 2 * expanded_size(); }

  // The hidden tokens of tokens `begin` to `end`, from x (prefix + tokens, channels).
  void expand(const T* x, T* memory, int64_t begin, int64_t end) const;
  // out (prefix + tokens, outputs) of the image's rows `begin` to `end`, and of the prefix tokens with the first of them.
  void contract(const T* x, const T* residual, T* memory, T* out, int64_t begin, int64_t end) const;
};

}  // namespace ceit::leff
