// LeFF's inference on one image, or on a band of its rows with those that the convolution reads beside it; the hidden
// tokens go from a GEMM to the convolution and to the next GEMM while they are in cache.
#pragma once

#include "../gemm/packing.h"
#include "calls.h"

namespace ceit::leff {

// What LeFF computes beside its parameters.
struct Sizes {
  int64_t channels, hidden, outputs, prefix;
  int height, width, side;
  Activation first, second;
  double eps[3];  // of the norms
};

template <class T>
struct Inference : Sizes {
  using Acc = acc_t<T>;
  gemm::Call<T> expanding, contracting;  // but for the rows
  const Acc *taps, *shift2;

  // Takes weight, bias, norm weight, norm bias, running mean and running variance of the three convolutions.
  Inference(const Sizes& sizes, gemm::Packer<T>& packer);

  int64_t tokens() const { return int64_t(height) * width; }
  // Elements of an image's memory.
  int64_t memory() const { return tokens() * 2 * hidden; }

  // The hidden tokens of tokens `begin` to `end`, from x (prefix + tokens, channels).
  void expand(const T* x, T* memory, int64_t begin, int64_t end) const;
  // out (prefix + tokens, outputs) of the image's rows `begin` to `end`, and of the prefix tokens of x with the first.
  template <class Out>
  void contract(const Out* x, const Out* residual, T* memory, Out* out, int64_t begin, int64_t end) const;
};

}  // namespace ceit::leff
