// The kernels of a call, one after another; included where they are instantiated.
#pragma once

#include <algorithm>

#include "calls.h"
#include "forward.h"
#include "image_gradient.h"

namespace ceit::i2t {

static_assert(kDepth == kPackedPerChannel);

template <class Acc>
Norm<Acc> make_norm(const Call& call) {
  return {static_cast<const Acc*>(call.gamma), static_cast<const Acc*>(call.beta), static_cast<const Acc*>(call.mean),
          static_cast<const Acc*>(call.variance), static_cast<Acc>(call.eps)};
}

template <class Mma>
void pack(const Call& call) {
  using Acc = typename Mma::Acc;
  const Problem& p = call.problem;
  const int64_t size = int64_t(p.out_channels) * kDepth;
  launch("pack_weights", pack_weights<Mma>, {ceil_div(size, 256)}, 256, 0, call.stream,
         static_cast<const Acc*>(call.weight), static_cast<const Acc*>(call.gamma),
         static_cast<typename Mma::Element*>(call.packed), p.channels, p.out_channels);
}

template <class Mma, class In>
void compute(const ForwardCall& call) {
  using Acc = typename Mma::Acc;
  using Output = typename Mma::Output;
  const Problem& s = call.problem;
  pack<Mma>(call);

  const int64_t places = s.batch * ceil_div(s.pooled_width, kStrips * kPooledColumns);
  const int groups = s.out_channels / kGroup, parts = int(ceil_div(groups, kMaximumGroups));
  const Grid grid{places * parts, ceil_div(s.pooled_height, call.rows_per_block)};
  const int rows = int(places * grid.y) * kStrips;
  Acc* counts = static_cast<Acc*>(call.moments);
  Moments<Acc> moments{};
  if (call.training) moments = {counts, counts + rows, counts + rows + int64_t(rows) * s.out_channels};
  const ForwardArguments<Mma> arguments{static_cast<const typename Mma::Element*>(call.packed),
                                        static_cast<Output*>(call.out),
                                        call.indices,
                                        make_norm<Acc>(call),
                                        moments,
                                        call.rows_per_block};
  const auto kernel = call.training  ? forward_kernel<Mma, In, true, true>
                      : call.indices ? forward_kernel<Mma, In, false, true>
                                     : forward_kernel<Mma, In, false, false>;
  const size_t shared = sizeof(typename Mma::Element) * kForwardImageRows * kForwardImageColumns * kChannels;
  launch("the stem's forward", kernel, grid, 32 * kStrips * groups / parts, shared, call.stream, s,
         static_cast<const In*>(call.image), arguments);
  if (!call.training) return;

  const Running<Output, Acc> running{call.running_mean,
                                     call.running_variance,
                                     call.batches,
                                     call.running_in_acc,
                                     Acc(1 - call.momentum),
                                     Acc(call.momentum),
                                     Acc(call.momentum * call.unbiased)};
  launch("merge_moments", merge_moments<Output, Acc>, {s.out_channels}, kMergeThreads, 3 * sizeof(Acc) * kMergeThreads,
         call.stream, moments, rows, static_cast<const Acc*>(call.gamma), static_cast<Acc*>(call.mean),
         static_cast<Acc*>(call.variance), running);
  const int64_t size = s.pooled_elements();
  const int64_t per_block = kNormaliseThreads * (16 / sizeof(Output));
  // A multiple of 3, so that a thread meets the same channels again where there are 96.
  const int64_t blocks = (std::min<int64_t>(ceil_div(size, per_block), 3072) + 2) / 3 * 3;
  launch("normalise", normalise<Output, Acc>, {blocks}, kNormaliseThreads, 0, call.stream,
         static_cast<Output*>(call.out), size, s.out_channels, make_norm<Acc>(call));
}

template <class Mma, class In>
void compute(const BackwardCall& call) {
  using Acc = typename Mma::Acc;
  const Problem& s = call.problem;
  pack<Mma>(call);

  const int64_t weights = int64_t(s.out_channels) * s.channels * kSide * kSide;
  Acc* start = static_cast<Acc*>(call.sums);
  const int64_t patches = weights / kBackwardChannels<Mma>;
  const GradientSums<Acc> sums{start, start + weights * call.blocks, start + 2 * weights * call.blocks,
                               start + (2 * weights + patches) * call.blocks};
  const BackwardArguments<Mma> arguments{static_cast<const typename Mma::Element*>(call.packed),
                                         static_cast<const typename Mma::Output*>(call.gradient), call.indices,
                                         make_norm<Acc>(call)};
  const In* image = static_cast<const In*>(call.image);
  const size_t operands = (call.training ? 2 : 1) * kOperandElements<Mma>;
  const size_t norms = call.training ? kNormElements<Mma> : 0;
  const size_t shared = sizeof(typename Mma::Element) * (kTileImageElements + operands) + sizeof(Acc) * norms;
  launch("the stem's weight gradient",
         call.training ? weight_gradient_kernel<Mma, In, true> : weight_gradient_kernel<Mma, In, false>,
         {call.blocks, s.out_channels / kBackwardChannels<Mma>}, kBackwardThreads<Mma>, shared, call.stream, s, image,
         arguments, sums);

  const Acc count = Acc(double(s.batch) * s.conv_height * s.conv_width);
  const Gradients<Acc> gradients{static_cast<Acc*>(call.grad_weight), static_cast<Acc*>(call.grad_gamma),
                                 static_cast<Acc*>(call.grad_beta)};
  launch("finish_gradients", finish_gradients<Mma>, {s.out_channels}, kFinishThreads, sizeof(Acc) * kFinishThreads,
         call.stream, sums, call.blocks, s.channels, call.training, count, static_cast<const Acc*>(call.weight),
         make_norm<Acc>(call), gradients);
  if (!call.grad_image) return;

  const ImageGradientArguments<Mma> image_arguments{static_cast<const Acc*>(call.weight), gradients, count};
  const int64_t tiles = ceil_div(s.width, kGradientColumns) * ceil_div(s.height, kGradientRows);
  launch("the stem's image gradient",
         call.training ? image_gradient_kernel<Mma, In, true> : image_gradient_kernel<Mma, In, false>,
         {s.batch * tiles}, kBackwardThreads<Mma>, shared, call.stream, s, image, arguments, image_arguments,
         static_cast<In*>(call.grad_image));
}

}  // namespace ceit::i2t
