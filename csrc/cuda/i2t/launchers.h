// The kernels of a call, one after another; included where they are instantiated.
#pragma once

#include "../launch.h"
#include "calls.h"
#include "forward.h"
#include "image_gradient.h"

namespace ceit::i2t {

static_assert(kDepth == kPackedPerChannel);

inline Problem make_problem(const Sizes& s) {
  return {s.batch,      s.channels,    s.height,     s.width,         s.strides[0],   s.strides[1],  s.strides[2],
          s.strides[3], s.conv_height, s.conv_width, s.pooled_height, s.pooled_width, s.out_channels};
}

template <class Real>
Norm<Real> make_norm(const Call& call) {
  return {static_cast<const Real*>(call.gamma), static_cast<const Real*>(call.beta),
          static_cast<const Real*>(call.mean), static_cast<const Real*>(call.variance), static_cast<Real>(call.eps)};
}

inline Grid forward_grid(const Sizes& s, int rows_per_block) {
  constexpr int kColumns = kStrips * kPooledColumns;
  return {int64_t(s.batch) * ((s.pooled_width + kColumns - 1) / kColumns),
          (s.pooled_height + rows_per_block - 1) / rows_per_block};
}

template <class P>
void pack(const Call& call) {
  using Real = typename P::Real;
  const int64_t size = int64_t(call.sizes.out_channels) * kDepth;
  launch("pack_weights", pack_weights<P>, {(size + 255) / 256}, 256, 0, call.stream,
         static_cast<const Real*>(call.weight), static_cast<const Real*>(call.gamma),
         static_cast<typename P::Element*>(call.packed), call.sizes.channels, call.sizes.out_channels);
}

template <class P, class In>
void forward(const ForwardCall& call) {
  using Real = typename P::Real;
  using Output = typename P::Output;
  const Sizes& s = call.sizes;
  pack<P>(call);

  const Grid grid = forward_grid(s, call.rows_per_block);
  const int rows = int(grid.x * grid.y) * kStrips;
  Real* counts = static_cast<Real*>(call.moments);
  Moments<Real> moments{};
  if (call.training) moments = {counts, counts + rows, counts + rows + int64_t(rows) * s.out_channels};
  const ForwardArguments<P> arguments{static_cast<const typename P::Element*>(call.packed),
                                      static_cast<Output*>(call.out),
                                      call.indices,
                                      make_norm<Real>(call),
                                      moments,
                                      call.rows_per_block};
  const auto kernel = call.training  ? forward_kernel<P, In, true, true>
                      : call.indices ? forward_kernel<P, In, false, true>
                                     : forward_kernel<P, In, false, false>;
  const size_t shared = sizeof(typename P::Element) * kForwardImageRows * kForwardImageColumns * kChannels;
  launch("the stem's forward", kernel, grid, 32 * kStrips * s.out_channels / kGroup, shared, call.stream,
         make_problem(s), static_cast<const In*>(call.image), arguments);
  if (!call.training) return;

  launch("merge_moments", merge_moments<Real>, {s.out_channels}, kMergeThreads, 3 * sizeof(Real) * kMergeThreads,
         call.stream, moments, rows, static_cast<const Real*>(call.gamma), static_cast<Real*>(call.mean),
         static_cast<Real*>(call.variance));
  const int64_t size = int64_t(s.batch) * s.pooled_height * s.pooled_width * s.out_channels;
  const int64_t per_block = kNormaliseThreads * (16 / sizeof(Output));
  // A multiple of 3, so that a thread meets the same channels again where there are 96.
  const int64_t blocks = (std::min<int64_t>((size + per_block - 1) / per_block, 3072) + 2) / 3 * 3;
  launch("normalise", normalise<Output, Real>, {blocks}, kNormaliseThreads, 0, call.stream,
         static_cast<Output*>(call.out), size, s.out_channels, make_norm<Real>(call));
}

template <class P, class In>
void backward(const BackwardCall& call) {
  using Real = typename P::Real;
  const Sizes& s = call.sizes;
  pack<P>(call);

  const int64_t weights = int64_t(s.out_channels) * s.channels * kSide * kSide;
  Real* start = static_cast<Real*>(call.sums);
  const GradientSums<Real> sums{start, start + weights * call.blocks, start + 2 * weights * call.blocks,
                                start + (2 * weights + weights / s.out_channels) * call.blocks};
  const BackwardArguments<P> arguments{static_cast<const typename P::Element*>(call.packed),
                                       static_cast<const typename P::Output*>(call.gradient), call.indices,
                                       make_norm<Real>(call)};
  const Problem problem = make_problem(s);
  const In* image = static_cast<const In*>(call.image);
  const size_t shared = sizeof(typename P::Element) * (kTileImageElements + (call.training ? 2 : 1) * kOperandElements);
  launch("the stem's weight gradient",
         call.training ? weight_gradient_kernel<P, In, true> : weight_gradient_kernel<P, In, false>,
         {call.blocks, s.out_channels / kBackwardChannels}, kBackwardThreads, shared, call.stream, problem, image,
         arguments, sums);

  const Real count = Real(double(s.batch) * s.conv_height * s.conv_width);
  const Gradients<Real> gradients{static_cast<Real*>(call.grad_weight), static_cast<Real*>(call.grad_gamma),
                                  static_cast<Real*>(call.grad_beta)};
  launch("finish_gradients", finish_gradients<P>, {s.out_channels}, kFinishThreads, sizeof(Real) * kFinishThreads,
         call.stream, sums, call.blocks, s.channels, call.training, count, static_cast<const Real*>(call.weight),
         make_norm<Real>(call), gradients);
  if (!call.grad_image) return;

  const ImageGradientArguments<P> image_arguments{static_cast<const Real*>(call.weight), gradients, count};
  const int64_t across = (s.width + kGradientColumns - 1) / kGradientColumns;
  const int64_t down = (s.height + kGradientRows - 1) / kGradientRows;
  launch("the stem's image gradient",
         call.training ? image_gradient_kernel<P, In, true> : image_gradient_kernel<P, In, false>,
         {s.batch * across * down}, kBackwardThreads, shared, call.stream, problem, image, arguments, image_arguments,
         static_cast<In*>(call.grad_image));
}

}  // namespace ceit::i2t
