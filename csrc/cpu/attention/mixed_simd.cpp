// Attention in three steps, with the scores of all heads in memory: scores, softmax of mixed heads, weighted sums.
#include "parts.h"

namespace ceit::attention::mixed {
namespace CEIT_CAPABILITY {

using namespace ceit::attention::CEIT_CAPABILITY;

namespace {

template <class Acc>
Matrix<Acc> scores_of_head(const MixedCall& call, int64_t head) {
  const int64_t stride = score_stride(call.shape.tokens);
  return {static_cast<Acc*>(call.scores) + head * score_rows(call.shape.queries) * stride, stride};
}

template <class T>
void score(const MixedCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const Shape& shape = call.shape;
  const Layout<Acc> layout(shape);
  const Scratch<Acc> keys(layout.padded_channels * score_stride(shape.tokens));
  const Scratch<Acc> queries(score_rows(shape.queries) * layout.channels);
  const Matrix<Acc> packed{queries.get(), layout.channels};
  for (int64_t head = begin; head < end; ++head) {
    const Matrix<Acc> scores = scores_of_head<Acc>(call, head);
    pack_transposed(Rows<const T>(call.k, shape, head), shape.tokens, shape.channels, keys.get(), scores.stride);
    pack<T, Acc>(Rows<const T>(call.q, shape, head), 0, shape.queries, shape.channels,
                 Scaling<Acc>(call.scale, call.bias).queries, packed);
    multiply<Acc>({packed.data, packed.stride, 1}, {keys.get(), scores.stride}, scores, shape.queries, shape.channels,
                  shape.tokens, false);
  }
}

// to[head] = added[head] + the sum over others of weights[head, other] * from[other], a row of scores of each.
template <class Acc>
void mix(const void* weights, const void* added, const Shape& shape, Matrix<const Acc> from, Matrix<Acc> to) {
  const Acc* weight = static_cast<const Acc*>(weights);
  for (int64_t head = 0; head < shape.heads; ++head, weight += shape.heads)
    for (int64_t c = 0; c < shape.tokens; c += Lanes<Acc>::count) {
      auto sum = splat(added ? static_cast<const Acc*>(added)[head] : Acc(0));
      for (int64_t other = 0; other < shape.heads; ++other)
        sum += weight[other] * load(from.data + other * from.stride + c);
      store(to.data + head * to.stride + c, sum);
    }
}

template <class T>
void softmax(const MixedCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const Shape& shape = call.shape;
  const int64_t heads = shape.heads, tokens = shape.tokens, width = score_stride(tokens);
  const int64_t stride = score_rows(shape.queries) * width;
  const Tail<Acc> tail(tokens);
  const Scaling<Acc> scaling(call.scale, call.bias);
  const Scratch<Acc> rows(heads * width);
  for (int64_t query = begin; query < end; ++query) {
    Acc* scores = static_cast<Acc*>(call.scores) + query * width;
    const Matrix<Acc> of_heads{scores, stride}, mixed{rows.get(), width};
    if (call.before) mix<Acc>(call.before, nullptr, shape, {scores, stride}, mixed);
    for (int64_t head = 0; head < heads; ++head) {
      Acc* row = call.before ? rows.get() + head * width : scores + head * stride;
      const T* bias = static_cast<const T*>(call.bias);
      if (bias)
        add_bias<T, Acc>(bias + (head * shape.queries + query) * tokens, scaling.products, {row, width}, 1, tokens);
      tail.mask(row);
      auto found = load(row);
      for (int64_t c = Lanes<Acc>::count; c < tokens; c += Lanes<Acc>::count) found = larger<Acc>(found, load(row + c));
      auto sum = splat(Acc(0));
      powers_of_two(row, row, tokens, largest_lane<Acc>(found), scaling.exponent, [&](int64_t, Vec<Acc> power) {
        sum += power;
        return power;
      });
      const Acc share = Acc(1) / sum_of_lanes<Acc>(sum);
      for (int64_t c = 0; c < tokens; c += Lanes<Acc>::count) store(row + c, load(row + c) * share);
    }
    if (call.after) mix<Acc>(call.after, call.added, shape, {rows.get(), width}, of_heads);
  }
}

template <class T>
void weigh(const MixedCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  Shape shape = call.shape;
  shape.channels = call.value_channels;
  const Layout<Acc> layout(shape);
  const Scratch<Acc> values(layout.tokens_by_channels()), results(score_rows(shape.queries) * layout.channels);
  for (int64_t head = begin; head < end; ++head) {
    const Matrix<Acc> scores = scores_of_head<Acc>(call, head), result{results.get(), layout.channels};
    pack<T, Acc>(Rows<const T>(call.v, shape, head), 0, shape.tokens, shape.channels, Acc(1),
                 {values.get(), layout.channels});
    multiply<Acc>({scores.data, scores.stride, 1}, {values.get(), layout.channels}, result, shape.queries, shape.tokens,
                  shape.channels, false);
    unpack<Acc>({results.get(), layout.channels}, Rows<T>(call.out, shape, shape.queries, 1, 0, head), 0, shape.queries,
                shape.channels, [](int64_t) { return Acc(1); });
  }
}

template <class T>
constexpr MixedKernels kernels_of() {
  return {score<T>, softmax<T>, weigh<T>};
}

}  // namespace

extern const MixedKernels kernels[3] = {kernels_of<float>(), kernels_of<Bf16>(), kernels_of<double>()};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::attention::mixed
