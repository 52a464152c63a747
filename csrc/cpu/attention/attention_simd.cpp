// Self-attention a block of queries at a time: scores, softmax and weighted sum while they are in cache.
#include "../scratch.h"
#include "../tile.h"
#include "calls.h"

namespace ceit::attention {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

// Rows of one head of one image, in a tensor (B, tokens, parts, heads, channels).
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  CEIT_INLINE Rows(void* tensor, const Shape& shape, int64_t tokens, int64_t parts, int64_t part, int64_t task)
      : stride(parts * shape.heads * shape.channels) {
    const int64_t image = task / shape.heads, head = task % shape.heads;
    data = static_cast<T*>(tensor) + image * tokens * stride + (part * shape.heads + head) * shape.channels;
  }
  CEIT_INLINE T* row(int64_t index) const { return data + index * stride; }
};

template <class T>
Rows<const T> part_of(const void* qkv, const Shape& shape, int64_t part, int64_t task) {
  return Rows<const T>(const_cast<void*>(qkv), shape, shape.tokens, 3, part, task);
}

// Strides of a head's packed matrices.
template <class Real>
struct Layout {
  int64_t channels, tokens;  // from row to row of matrices with so many columns
  int64_t padded_channels, padded_tokens;  // rows
  explicit Layout(const Shape& shape)
      : channels(row_stride<Real>(shape.channels)),
        tokens(row_stride<Real>(shape.tokens)),
        padded_channels(round_up(shape.channels, Lanes<Real>::count)),
        padded_tokens(round_up(shape.tokens, kRowMultiple)) {}
  // Elements of a matrix with a row for each channel and a column for each token, and so on. Rows of scores are read
  // as columns of the last tile, so beyond their end.
  int64_t channels_by_tokens() const { return padded_channels * tokens; }
  int64_t tokens_by_channels() const { return padded_tokens * channels; }
  int64_t queries_by_channels() const { return kQueries * channels; }
  int64_t queries_by_tokens() const { return kQueries * tokens + kRowMultiple; }
};

// to = factor * rows, in the type that is computed in.
template <class T, class Real>
void pack(const Rows<const T>& from, int64_t first, int64_t count, int64_t channels, Real factor, Matrix<Real> to) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t c = 0; c < channels; c += Lanes<Real>::count)
      store(to.data + row * to.stride + c, factor * load(from.row(first + row) + c, int(channels - c)));
}

// The transposed rows; columns beyond `count` become zero up to a whole vector.
template <class T, class Real>
void pack_transposed(const Rows<const T>& from, int64_t count, int64_t channels, Matrix<Real> to) {
  constexpr int lanes = Lanes<Real>::count;
  for (int64_t row = 0; row < count; row += lanes)
    for (int64_t c = 0; c < channels; c += lanes) {
      Square<Real> square;
      for (int i = 0; i < lanes; ++i)
        square.rows[i] = row + i < count ? load(from.row(row + i) + c, int(channels - c)) : splat(Real(0));
      square.transpose();
      for (int i = 0; i < lanes; ++i) store(to.data + (c + i) * to.stride + row, square.rows[i]);
    }
}

// rows = factor * from, in the type of the tensor; the factor may differ between rows.
template <class T, class Real, class Factor>
void unpack(Matrix<const Real> from, const Rows<T>& to, int64_t first, int64_t count, int64_t channels, Factor factor) {
  for (int64_t row = 0; row < count; ++row) {
    const Real by = factor(row);
    for (int64_t c = 0; c < channels; c += Lanes<Real>::count)
      store(to.row(first + row) + c, by * load(from.data + row * from.stride + c), int(channels - c));
  }
}

// Takes columns beyond the last token out of the softmax.
template <class Real>
class Tail {
 public:
  explicit Tail(int64_t tokens) : start_(tokens / Lanes<Real>::count * Lanes<Real>::count) {
    for (int i = 0; i < Lanes<Real>::count; ++i) added_[i] = start_ + i < tokens ? Real(0) : -Real(INFINITY);
    if (start_ == tokens) start_ = -1;
  }
  CEIT_INLINE void mask(Real* row) const {
    if (start_ >= 0) store(row + start_, load(row + start_) + load(added_));
  }

 private:
  int64_t start_;
  alignas(64) Real added_[Lanes<Real>::count];
};

// e^x, which `exponential` alone does not tell from a number where x is none.
template <class Real>
CEIT_INLINE Vec<Real> exponential_or_nan(Vec<Real> x) {
  const auto e = exponential(x);
  return x == x ? e : x;
}

template <class Real>
CEIT_INLINE Real largest_of(const Real* row, int64_t count) {
  auto largest = load(row);
  for (int64_t i = Lanes<Real>::count; i < count; i += Lanes<Real>::count) largest = larger<Real>(largest, load(row + i));
  return largest_lane<Real>(largest);
}

// row = e^(row - shift) * factor
template <class Real, class Visit>
CEIT_INLINE void exponentials(Real* row, int64_t count, Real shift, Visit visit) {
  for (int64_t i = 0; i < count; i += Lanes<Real>::count)
    store(row + i, visit(i, exponential_or_nan<Real>(load(row + i) - shift)));
}

}  // namespace

template <class T>
void forward(const ForwardCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const Shape& shape = call.shape;
  const int64_t channels = shape.channels, blocks = shape.blocks();
  const Layout<Real> layout(shape);
  const Tail<Real> tail(shape.tokens);
  const Scratch<Real> keys(layout.channels_by_tokens()), values(layout.tokens_by_channels());
  const Scratch<Real> queries(layout.queries_by_channels()), results(layout.queries_by_channels());
  const Scratch<Real> scores(layout.queries_by_tokens());
  Real largest[kQueries], sums[kQueries];
  int64_t packed = -1;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t task = index / blocks, first = index % blocks * kQueries;
    const int64_t count = shape.queries - first < kQueries ? shape.queries - first : kQueries;
    if (task != packed) {
      pack_transposed<T, Real>(part_of<T>(call.qkv, shape, 1, task), shape.tokens, channels, {keys.get(), layout.tokens});
      pack<T, Real>(part_of<T>(call.qkv, shape, 2, task), 0, shape.tokens, channels, Real(1),
                    {values.get(), layout.channels});
      packed = task;
    }
    pack<T, Real>(part_of<T>(call.qkv, shape, 0, task), first, count, channels, Real(call.scale),
                  {queries.get(), layout.channels});
    multiply<Real>({queries.get(), layout.channels, 1}, {keys.get(), layout.tokens}, {scores.get(), layout.tokens}, count,
                   channels, shape.tokens, false);
    for (int64_t i = 0; i < count; ++i) {
      tail.mask(scores.get() + i * layout.tokens);
      largest[i] = largest_of(scores.get() + i * layout.tokens, shape.tokens);
    }
    for (int64_t i = 0; i < count; ++i) {
      auto sum = splat(Real(0));
      exponentials(scores.get() + i * layout.tokens, shape.tokens, largest[i], [&](int64_t, Vec<Real> e) {
        sum += e;
        return e;
      });
      sums[i] = sum_of_lanes<Real>(sum);
    }
    multiply<Real>({scores.get(), layout.tokens, 1}, {values.get(), layout.channels}, {results.get(), layout.channels},
                   count, shape.tokens, channels, false);
    const Rows<T> out(call.out, shape, shape.queries, 1, 0, task);
    unpack<T, Real>({results.get(), layout.channels}, out, first, count, channels,
                    [&](int64_t row) { return Real(1) / sums[row]; });
    if (call.statistics) {
      Real* to = static_cast<Real*>(call.statistics) + (task * shape.queries + first) * 2;
      for (int64_t i = 0; i < count; ++i) to[2 * i] = largest[i], to[2 * i + 1] = sums[i];
    }
  }
}

template <class T>
void backward(const BackwardCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  const Shape& shape = call.shape;
  const int64_t channels = shape.channels, tokens = shape.tokens;
  const Layout<Real> layout(shape);
  const Tail<Real> tail(tokens);
  const Scratch<Real> keys_t(layout.channels_by_tokens()), values_t(layout.channels_by_tokens());
  const Scratch<Real> keys(layout.tokens_by_channels());
  const Scratch<Real> grad_keys(layout.tokens_by_channels()), grad_values(layout.tokens_by_channels());
  const Scratch<Real> queries(layout.queries_by_channels()), grad_out(layout.queries_by_channels());
  const Scratch<Real> grad_queries(layout.queries_by_channels());
  const Scratch<Real> p(layout.queries_by_tokens()), grad_p(layout.queries_by_tokens());
  for (int64_t task = begin; task < end; ++task) {
    const auto q = part_of<T>(call.qkv, shape, 0, task), k = part_of<T>(call.qkv, shape, 1, task);
    const Rows<const T> dout(const_cast<void*>(call.grad_out), shape, shape.queries, 1, 0, task);
    const Rows<T> dq(call.grad_qkv, shape, tokens, 3, 0, task);
    pack_transposed<T, Real>(k, tokens, channels, {keys_t.get(), layout.tokens});
    pack_transposed<T, Real>(part_of<T>(call.qkv, shape, 2, task), tokens, channels, {values_t.get(), layout.tokens});
    pack<T, Real>(k, 0, tokens, channels, Real(1), {keys.get(), layout.channels});
    const Real* statistics = static_cast<const Real*>(call.statistics) + task * shape.queries * 2;
    for (int64_t first = 0; first < shape.queries; first += kQueries) {
      const int64_t count = shape.queries - first < kQueries ? shape.queries - first : kQueries;
      pack<T, Real>(q, first, count, channels, Real(call.scale), {queries.get(), layout.channels});
      pack<T, Real>(dout, first, count, channels, Real(1), {grad_out.get(), layout.channels});
      multiply<Real>({queries.get(), layout.channels, 1}, {keys_t.get(), layout.tokens}, {p.get(), layout.tokens}, count,
                     channels, tokens, false);
      multiply<Real>({grad_out.get(), layout.channels, 1}, {values_t.get(), layout.tokens}, {grad_p.get(), layout.tokens},
                     count, channels, tokens, false);
      for (int64_t i = 0; i < count; ++i) {
        Real *row = p.get() + i * layout.tokens, *grad_row = grad_p.get() + i * layout.tokens;
        const Real largest = statistics[2 * (first + i)], share = Real(1) / statistics[2 * (first + i) + 1];
        auto sum = splat(Real(0));
        tail.mask(row);
        exponentials(row, tokens, largest, [&](int64_t at, Vec<Real> e) {
          const auto value = e * share;
          sum += value * load(grad_row + at);
          return value;
        });
        const Real mean = sum_of_lanes<Real>(sum);
        for (int64_t at = 0; at < tokens; at += Lanes<Real>::count)
          store(grad_row + at, load(row + at) * (load(grad_row + at) - mean));
      }
      // The scores' gradients without the scale, which the queries carry.
      multiply<Real>({grad_p.get(), layout.tokens, 1}, {keys.get(), layout.channels}, {grad_queries.get(), layout.channels},
                     count, tokens, channels, false);
      multiply<Real>({grad_p.get(), 1, layout.tokens}, {queries.get(), layout.channels}, {grad_keys.get(), layout.channels},
                     tokens, count, channels, first > 0);
      multiply<Real>({p.get(), 1, layout.tokens}, {grad_out.get(), layout.channels}, {grad_values.get(), layout.channels},
                     tokens, count, channels, first > 0);
      unpack<T, Real>({grad_queries.get(), layout.channels}, dq, first, count, channels,
                      [&](int64_t) { return Real(call.scale); });
    }
    for (int64_t row = shape.queries; row < tokens; ++row)
      std::memset(static_cast<void*>(dq.row(row)), 0, sizeof(T) * size_t(channels));
    const auto one = [](int64_t) { return Real(1); };
    unpack<T, Real>({grad_keys.get(), layout.channels}, Rows<T>(call.grad_qkv, shape, tokens, 3, 1, task), 0, tokens,
                    channels, one);
    unpack<T, Real>({grad_values.get(), layout.channels}, Rows<T>(call.grad_qkv, shape, tokens, 3, 2, task), 0, tokens,
                    channels, one);
  }
}

extern const Kernels kernels[3];
const Kernels kernels[3] = {
    {forward<float>, backward<float>}, {forward<Bf16>, backward<Bf16>}, {forward<double>, backward<double>}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::attention
