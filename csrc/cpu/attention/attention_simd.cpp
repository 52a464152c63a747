// Self-attention a tile of queries at a time: scores, softmax and weighted sum while they are in cache.
#include "products.h"

namespace ceit::attention {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

// Queries of one head of one image that are worked on together: those from query `at` of all on, before `end`.
struct QueryTile {
  int64_t task, first, count;
  QueryTile(const Shape& shape, int64_t at, int64_t end)
      : task(at / shape.queries),
        first(at % shape.queries),
        count(min_of(min_of(shape.queries - first, end - at), kQueries)) {}
};

// Rows of the result of a head, whose image may be a window of a larger one.
template <class T>
class Result {
 public:
  CEIT_INLINE Result(const ForwardCall& call, int64_t task)
      : rows_(call.out, call.shape, call.shape.queries, 1, 0, task), window_(call.window), width_(call.width) {
    if (!window_) return;
    const int64_t image = task / call.shape.heads, across = width_ / window_;
    const int64_t first = image / across * window_ * width_ + image % across * window_;
    rows_.data += (first - image * call.shape.queries) * rows_.stride;
  }
  CEIT_INLINE T* row(int64_t index) const {
    return rows_.row(window_ ? index / window_ * width_ + index % window_ : index);
  }

 private:
  Rows<T> rows_;
  int64_t window_, width_;
};

template <class T>
Rows<const T> part_of(const void* qkv, const Shape& shape, int part, int64_t task) {
  return {attention::part_of(qkv, shape, part), shape, task};
}

template <class T>
Rows<const T> gradient_of(const void* grad_out, const Shape& shape, int64_t task) {
  return Rows<const T>(const_cast<void*>(grad_out), shape, shape.queries, 1, 0, task);
}

// Asks for rows that are going to be read, or written, while others are computed.
template <bool written = false, class Rows>
CEIT_INLINE void prefetch(const Rows& rows, int64_t first, int64_t count, int64_t channels) {
  constexpr int64_t line = 64 / sizeof(*rows.row(0));
  for (int64_t row = first; row < first + count; ++row)
    for (int64_t c = 0; c < channels; c += line) __builtin_prefetch(rows.row(row) + c, written, 2);
}

// Asks for the queries behind a tile, and for its share of the keys and values of the next head.
template <class T>
CEIT_INLINE void prefetch_next(const Operand& q, const Operand& k, const Operand& v, const Shape& shape,
                               const QueryTile& tile, int64_t end) {
  const int64_t at = tile.task * shape.queries + tile.first + tile.count;
  if (at >= end) return;
  const QueryTile next(shape, at, end);
  prefetch(Rows<const T>(q, shape, next.task), next.first, next.count, shape.channels);
  if ((tile.task + 1) * shape.queries >= end) return;
  const int64_t first = shape.tokens * tile.first / shape.queries;
  const int64_t last = shape.tokens * (tile.first + tile.count) / shape.queries;
  prefetch(Rows<const T>(k, shape, tile.task + 1), first, last - first, shape.channels);
  prefetch(Rows<const T>(v, shape, tile.task + 1), first, last - first, shape.channels);
}

// Scores become the softmax times the sum of each row, in the type of `to`, whose rows start where theirs do. One pass
// for all rows at a time, so that reductions overlap.
template <class Acc, class To>
CEIT_INLINE void softmax(Matrix<Acc> scores, To* to, int64_t rows, int64_t tokens, const Tail<Acc>& tail, Acc* largest,
                         Acc exponent, Acc* sums) {
  constexpr int64_t fraction = sizeof(Acc) / sizeof(To);
  for (int64_t i = 0; i < rows; ++i) {
    const Acc* row = scores.data + i * scores.stride;
    tail.mask(scores.data + i * scores.stride);
    auto found = load(row);
    for (int64_t j = Lanes<Acc>::count; j < tokens; j += Lanes<Acc>::count) found = larger<Acc>(found, load(row + j));
    largest[i] = largest_lane<Acc>(found);
  }
  for (int64_t i = 0; i < rows; ++i) {
    auto sum = splat(Acc(0));
    const Acc* row = scores.data + i * scores.stride;
    powers_of_two(row, to + i * scores.stride * fraction, tokens, largest[i], exponent, [&](int64_t, Vec<Acc> power) {
      sum += power;
      return power;
    });
    sums[i] = sum_of_lanes<Acc>(sum);
  }
}

// The gradient of the largest score's weight, from which the others' are measured: those that are large and nearly the
// same count by their differences alone, and where one weight is all there is, its score's gradient is zero and not
// what is left of roundings.
template <class Acc>
CEIT_INLINE Acc gradient_of_largest(const Acc* row, const Acc* gradient, int64_t tokens, Acc largest) {
  auto found = splat(-Acc(INFINITY));
  for (int64_t at = 0; at < tokens; at += Lanes<Acc>::count)
    found = larger<Acc>(found, load(row + at) == splat(largest) ? load(gradient + at) : splat(-Acc(INFINITY)));
  const Acc about = largest_lane<Acc>(found);
  return about > -Acc(INFINITY) ? about : gradient[0];
}

// Scores become the softmax, and its gradient that of the scores.
template <class Acc>
CEIT_INLINE void softmax_backward(Matrix<Acc> scores, Matrix<Acc> gradient, int64_t rows, int64_t tokens,
                                  const Tail<Acc>& tail, Acc exponent, const Acc* statistics) {
  for (int64_t i = 0; i < rows; ++i) {
    Acc *row = scores.data + i * scores.stride, *grad_row = gradient.data + i * gradient.stride;
    tail.mask(row);
    const Acc largest = statistics[2 * i], share = Acc(1) / statistics[2 * i + 1];
    const Acc about = gradient_of_largest(row, grad_row, tokens, largest);
    auto sum = splat(Acc(0));
    powers_of_two(row, row, tokens, largest, exponent, [&](int64_t at, Vec<Acc> power) {
      const auto weight = power * share;
      sum += weight * (load(grad_row + at) - about);
      return weight;
    });
    const Acc mean = about + sum_of_lanes<Acc>(sum);
    for (int64_t at = 0; at < tokens; at += Lanes<Acc>::count)
      store(grad_row + at, load(row + at) * (load(grad_row + at) - mean));
  }
}

}  // namespace

template <class T>
void forward(const ForwardCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const Shape& shape = call.shape;
  const int64_t channels = shape.channels;
  const Layout<Acc> layout(shape);
  const Tail<Acc> tail(shape.tokens);
  const Scaling<Acc> scaling(call.scale, call.bias);
  const Products<T> products(shape, scaling.queries);
  const Scratch<Acc> results(layout.queries_by_channels()), scratch(layout.queries_by_tokens());
  const Matrix<Acc> scores{scratch.get(), layout.tokens}, result{results.get(), layout.channels};
  Acc largest[kQueries], sums[kQueries];
  int64_t packed_task = -1;
  for (int64_t at = begin; at < end;) {
    const QueryTile tile(shape, at, end);
    const int64_t task = tile.task, first = tile.first, count = tile.count;
    at += count;
    if (task != packed_task) {
      products.pack_keys(Rows<const T>(call.k, shape, task));
      products.pack_values(Rows<const T>(call.v, shape, task));
      packed_task = task;
    }
    products.pack_queries(Rows<const T>(call.q, shape, task), first, count);
    const Result<T> out(call, task);
    prefetch<true>(out, first, count, channels);
    prefetch_next<T>(call.q, call.k, call.v, shape, tile, end);
    products.score(count, scores);
    if (call.bias) {
      const int64_t row = task % shape.heads * shape.queries + first;
      add_bias(static_cast<const T*>(call.bias) + row * shape.tokens, scaling.products, scores, count, shape.tokens);
    }
    softmax(scores, products.weights(scores), count, shape.tokens, tail, largest, scaling.exponent, sums);
    products.weigh(count, scores, result);
    unpack<Acc>({result.data, result.stride}, out, first, count, channels,
                [&](int64_t row) { return Acc(1) / sums[row]; });
    if (call.statistics) {
      Acc* to = static_cast<Acc*>(call.statistics) + (task * shape.queries + first) * 2;
      for (int64_t i = 0; i < count; ++i) to[2 * i] = largest[i], to[2 * i + 1] = sums[i];
    }
  }
}

template <class T>
void backward(const BackwardCall& call, int64_t begin, int64_t end) {
  using Acc = acc_t<T>;
  const Shape& shape = call.shape;
  const int64_t channels = shape.channels, tokens = shape.tokens;
  const Layout<Acc> layout(shape);
  const Tail<Acc> tail(tokens);
  // Of the forward pass's own products, for a large score's rounding makes other weights.
  const Scaling<Acc> scaling(call.scale, false);
  const Products<T> products(shape, scaling.queries);
  const Scratch<Acc> values_t(layout.channels_by_tokens()), keys(layout.tokens_by_channels());
  const Scratch<Acc> grad_keys(layout.tokens_by_channels()), grad_values(layout.tokens_by_channels());
  const Scratch<Acc> queries(layout.queries_by_channels()), grad_out(layout.queries_by_channels());
  const Scratch<Acc> grad_queries(layout.queries_by_channels());
  const Scratch<Acc> p(layout.queries_by_tokens()), grad_p(layout.queries_by_tokens());
  for (int64_t task = begin; task < end; ++task) {
    const auto q = part_of<T>(call.qkv, shape, 0, task), k = part_of<T>(call.qkv, shape, 1, task);
    const auto dout = gradient_of<T>(call.grad_out, shape, task);
    const Rows<T> dq(call.grad_qkv, shape, tokens, 3, 0, task);
    products.pack_keys(k);
    pack_transposed(part_of<T>(call.qkv, shape, 2, task), tokens, channels, values_t.get(), layout.tokens);
    pack<T, Acc>(k, 0, tokens, channels, Acc(1), {keys.get(), layout.channels});
    const Acc* statistics = static_cast<const Acc*>(call.statistics) + task * shape.queries * 2;
    for (int64_t at = task * shape.queries; at < (task + 1) * shape.queries;) {
      const QueryTile tile(shape, at, end * shape.queries);
      const int64_t first = tile.first, count = tile.count;
      at += count;
      products.pack_queries(q, first, count);
      pack<T, Acc>(q, first, count, channels, Acc(call.scale), {queries.get(), layout.channels});
      pack<T, Acc>(dout, first, count, channels, Acc(1), {grad_out.get(), layout.channels});
      prefetch<true>(dq, first, count, channels);
      prefetch_next<T>(attention::part_of(call.qkv, shape, 0), attention::part_of(call.qkv, shape, 1),
                       attention::part_of(call.qkv, shape, 2), shape, tile, end * shape.queries);
      if (at < end * shape.queries) {
        const QueryTile next(shape, at, end * shape.queries);
        prefetch(gradient_of<T>(call.grad_out, shape, next.task), next.first, next.count, channels);
      }
      products.score(count, {p.get(), layout.tokens});
      multiply<Acc>({grad_out.get(), layout.channels, 1}, {values_t.get(), layout.tokens},
                    {grad_p.get(), layout.tokens}, count, channels, tokens, false);
      softmax_backward<Acc>({p.get(), layout.tokens}, {grad_p.get(), layout.tokens}, count, tokens, tail,
                            scaling.exponent, statistics + 2 * first);
      // Packed queries bring the scale into the keys' gradient; their own gets it as it is unpacked.
      multiply<Acc>({grad_p.get(), layout.tokens, 1}, {keys.get(), layout.channels},
                    {grad_queries.get(), layout.channels}, count, tokens, channels, false);
      multiply<Acc>({grad_p.get(), 1, layout.tokens}, {queries.get(), layout.channels},
                    {grad_keys.get(), layout.channels}, tokens, count, channels, first > 0);
      multiply<Acc>({p.get(), 1, layout.tokens}, {grad_out.get(), layout.channels},
                    {grad_values.get(), layout.channels}, tokens, count, channels, first > 0);
      unpack<Acc>({grad_queries.get(), layout.channels}, dq, first, count, channels,
                  [&](int64_t) { return Acc(call.scale); });
    }
    for (int64_t row = shape.queries; row < tokens; ++row)
      std::memset(static_cast<void*>(dq.row(row)), 0, sizeof(T) * size_t(channels));
    unpack<Acc>({grad_keys.get(), layout.channels}, Rows<T>(call.grad_qkv, shape, tokens, 3, 1, task), 0, tokens,
                channels, [](int64_t) { return Acc(1); });
    unpack<Acc>({grad_values.get(), layout.channels}, Rows<T>(call.grad_qkv, shape, tokens, 3, 2, task), 0, tokens,
                channels, [](int64_t) { return Acc(1); });
  }
}

extern const Kernels kernels[3] = {
    {forward<float>, backward<float>}, {forward<Bf16>, backward<Bf16>}, {forward<double>, backward<double>}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::attention
