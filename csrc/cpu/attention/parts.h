// What the kernels of attention share: rows of a head, packed and unpacked, and parts of the softmax.
#pragma once

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
  CEIT_INLINE Rows(const Operand& of, const Shape& shape, int64_t task)
      : data(static_cast<T*>(of.data) + of.offset + task / shape.heads * of.image + task % shape.heads * of.head),
        stride(of.token) {}
  CEIT_INLINE T* row(int64_t index) const { return data + index * stride; }
};

// Scores are products of queries and keys and nothing more, for each rounding of a large score makes other weights.
// What scales them comes to their differences.
template <class Acc>
struct Scaling {
  static constexpr double kLog2E = 1.4426950408889634;
  Acc queries;   // their sign in the scores: the largest product is the largest score; 0 where all scores are
  Acc products;  // to be added to biases
  Acc exponent;  // of two, for a difference of scores
  Scaling(double scale, bool biased)
      : queries(scale > 0   ? Acc(1)
                : scale < 0 ? Acc(-1)
                            : Acc(scale)),
        products(scale ? Acc(std::abs(scale)) : Acc(1)),
        exponent(biased ? Acc(kLog2E) : Acc(kLog2E * (scale ? std::abs(scale) : 1))) {}
};

// Strides of a head's packed matrices.
template <class Acc>
struct Layout {
  int64_t channels, tokens;                // from row to row of matrices with so many columns
  int64_t padded_channels, padded_tokens;  // rows
  explicit Layout(const Shape& shape)
      : channels(row_stride<Acc>(shape.channels)),
        tokens(row_stride<Acc>(shape.tokens)),
        padded_channels(ceil_div(shape.channels, Lanes<Acc>::count) * Lanes<Acc>::count),
        padded_tokens(ceil_div(shape.tokens, kRowMultiple) * kRowMultiple) {}
  // Elements of a matrix with a row for each channel and a column for each token, and so on. Rows of scores are read
  // as columns of the last tile, so beyond their end.
  int64_t channels_by_tokens() const { return padded_channels * tokens; }
  int64_t tokens_by_channels() const { return padded_tokens * channels; }
  int64_t queries_by_channels() const { return kQueries * channels; }
  int64_t queries_by_tokens() const { return kQueries * tokens + kRowMultiple; }
};

// to = factor * rows, in the type that is computed in.
template <class T, class Acc>
void pack(const Rows<const T>& from, int64_t first, int64_t count, int64_t channels, Acc factor, Matrix<Acc> to) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t c = 0; c < channels; c += Lanes<Acc>::count)
      store(to.data + row * to.stride + c, factor * load(from.row(first + row) + c, int(channels - c)));
}

// The transposed rows; `to` is zero beyond them.
template <class T, class Acc>
void pack_transposed(const Rows<const T>& from, int64_t count, int64_t channels, Acc* to, int64_t stride) {
  transpose(from.data, from.stride, count, channels, to, stride);
}

// rows = factor * from, in the type of the tensor; the factor may differ between rows.
template <class Acc, class To, class Factor>
void unpack(Matrix<const Acc> from, const To& to, int64_t first, int64_t count, int64_t channels, Factor factor) {
  for (int64_t row = 0; row < count; ++row) {
    const Acc by = factor(row);
    for (int64_t c = 0; c < channels; c += Lanes<Acc>::count)
      store(to.row(first + row) + c, by * load(from.data + row * from.stride + c), int(channels - c));
  }
}

// Takes columns beyond the last token out of the softmax.
template <class Acc>
class Tail {
 public:
  explicit Tail(int64_t tokens) : start_(tokens / Lanes<Acc>::count * Lanes<Acc>::count) {
    for (int i = 0; i < Lanes<Acc>::count; ++i) added_[i] = start_ + i < tokens ? Acc(0) : -Acc(INFINITY);
    if (start_ == tokens) start_ = -1;
  }
  CEIT_INLINE void mask(Acc* row) const {
    if (start_ >= 0) store(row + start_, load(row + start_) + load(added_));
  }

 private:
  int64_t start_;
  alignas(64) Acc added_[Lanes<Acc>::count];
};

// to = visit(index, 2^(exponent * (row - largest))); `to` may start where the row does.
template <class Acc, class To, class Visit>
CEIT_INLINE void powers_of_two(const Acc* row, To* to, int64_t tokens, Acc largest, Acc exponent, Visit visit) {
  for (int64_t i = 0; i < tokens; i += Lanes<Acc>::count)
    store(to + i, visit(i, power_of_two(exponent * (load(row + i) - largest))));
}

// scores = factor * scores + bias, of which rows are `tokens` apart.
template <class T, class Acc>
CEIT_INLINE void add_bias(const T* bias, Acc factor, Matrix<Acc> scores, int64_t rows, int64_t tokens) {
  for (int64_t i = 0; i < rows; ++i) {
    Acc* row = scores.data + i * scores.stride;
    for_vectors<Acc>(tokens, [&](int64_t j, auto count) {
      store(row + j, factor * load(row + j, count) + load(bias + i * tokens + j, count), count);
    });
  }
}

}  // namespace
}  // namespace CEIT_CAPABILITY
}  // namespace ceit::attention
