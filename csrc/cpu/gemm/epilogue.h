// What follows a GEMM, for a vector of columns: activation(sum * scale + shift) + residual.
#pragma once

#include "../activations.h"
#include "calls.h"

namespace ceit::gemm {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

template <Activation kind, class T, class Out>
class Epilogue {
 public:
  using Acc = acc_t<T>;
  CEIT_INLINE Epilogue(const Call<T, Out>& call, int64_t column, int count)
      : out_(call.out + column),
        residual_(call.residual ? call.residual + column : nullptr),
        stride_(call.out_stride),
        count_(count),
        scale_(call.scale ? load(call.scale + column, count) : splat(Acc(1))),
        shift_(call.shift ? load(call.shift + column, count) : splat(Acc(0))) {}
  CEIT_INLINE void write(int64_t row, Vec<Acc> sum) const {
    auto value = activate<kind, Acc>(sum * scale_ + shift_);
    if (residual_) value += load(residual_ + row * stride_, count_);
    store(out_ + row * stride_, value, count_);
  }

 private:
  Out* out_;
  const Out* residual_;
  int64_t stride_;
  int count_;
  Vec<Acc> scale_, shift_;
};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::gemm
