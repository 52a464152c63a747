// The two matmuls of a head's attention, of operands that are packed for them: in the type that is computed in, or in
// bfloat16 where the processor multiplies it.
#pragma once

#include "parts.h"

namespace ceit::attention {
namespace CEIT_CAPABILITY {
namespace {

// Of keys and values of one head, and of a tile of its queries.
template <class T>
class Products {
 public:
  using Acc = acc_t<T>;
  // Scores are products of queries and keys times their sign.
  Products(const Shape& shape, Acc sign)
      : shape_(shape),
        sign_(sign),
        layout_(shape),
        queries_(layout_.queries_by_channels()),
        keys_(layout_.channels_by_tokens()),
        values_(layout_.tokens_by_channels()) {}
  void pack_keys(const Rows<const T>& rows) const {
    pack_transposed(rows, shape_.tokens, shape_.channels, keys_.get(), layout_.tokens);
  }
  void pack_values(const Rows<const T>& rows) const {
    pack<T, Acc>(rows, 0, shape_.tokens, shape_.channels, Acc(1), {values_.get(), layout_.channels});
  }
  void pack_queries(const Rows<const T>& rows, int64_t first, int64_t count) const {
    pack<T, Acc>(rows, first, count, shape_.channels, sign_, {queries_.get(), layout_.channels});
  }
  void score(int64_t count, Matrix<Acc> scores) const {
    multiply<Acc>({queries_.get(), layout_.channels, 1}, {keys_.get(), layout_.tokens}, scores, count, shape_.channels,
                  shape_.tokens, false);
  }
  // Where the weights belong that scores become, in the type in which they are multiplied.
  Acc* weights(Matrix<Acc> scores) const { return scores.data; }
  void weigh(int64_t count, Matrix<Acc> scores, Matrix<Acc> result) const {
    multiply<Acc>({scores.data, scores.stride, 1}, {values_.get(), layout_.channels}, result, count, shape_.tokens,
                  shape_.channels, false);
  }

 private:
  const Shape& shape_;
  Acc sign_;
  Layout<Acc> layout_;
  Scratch<Acc> queries_, keys_, values_;
};

#if defined(__AVX512BF16__)
// Packed matrices are of pairs along the depth of a product, each in the place of a float: of channels for the scores,
// of tokens behind them. A last one without a partner has zero beside it.
template <>
class Products<Bf16> {
 public:
  Products(const Shape& shape, float sign)
      : shape_(shape),
        sign_(sign),
        pairs_(ceil_div(shape.channels, 2)),
        layout_(shape),
        queries_(layout_.queries_by_channels()),
        keys_(layout_.channels_by_tokens()),
        values_(layout_.tokens_by_channels()) {}
  void pack_keys(const Rows<const Bf16>& rows) const {
    constexpr int lanes = Lanes<float>::count;
    for_vectors<float>(shape_.tokens, [&](int64_t token, auto height) {
      for_vectors<float>(pairs_, [&](int64_t pair, auto width) {
        Square<float> square;
        for (int i = 0; i < lanes; ++i)
          square.rows[i] = i < height ? load_pairs(rows.row(token + i), pair) : splat(0.0f);
        square.transpose();
        for (int j = 0; j < width; ++j)
          store(keys_.get() + (pair + j) * layout_.tokens + token, square.rows[j], height);
      });
    });
  }
  void pack_values(const Rows<const Bf16>& rows) const {
    using Words = Lanes<float>::Words;
    for (int64_t token = 0; token < shape_.tokens; token += 2)
      for_vectors<float>(shape_.channels, [&](int64_t c, auto count) {
        auto pairs = reinterpret_cast<Words>(load(rows.row(token) + c, count)) >> 16;
        if (token + 1 < shape_.tokens) pairs |= reinterpret_cast<Words>(load(rows.row(token + 1) + c, count));
        store(values_.get() + token / 2 * layout_.channels + c, reinterpret_cast<Vec<float>>(pairs));
      });
  }
  void pack_queries(const Rows<const Bf16>& rows, int64_t first, int64_t count) const {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t pair = 0; pair < pairs_; pair += Lanes<float>::count)
        store(queries_.get() + row * layout_.channels + pair, load_pairs(rows.row(first + row), pair));
  }
  void score(int64_t count, Matrix<float> scores) const {
    multiply<float>({queries_.get(), layout_.channels, 1}, {keys_.get(), layout_.tokens}, scores, count, pairs_,
                    shape_.tokens, false, Pair{sign_});
  }
  Bf16* weights(Matrix<float> scores) const { return reinterpret_cast<Bf16*>(scores.data); }
  void weigh(int64_t count, Matrix<float> scores, Matrix<float> result) const {
    multiply<float>({scores.data, scores.stride, 1}, {values_.get(), layout_.channels}, result, count,
                    ceil_div(shape_.tokens, 2), shape_.channels, false, Pair{});
  }

 private:
  // Channels of a row, two in each lane.
  CEIT_INLINE Vec<float> load_pairs(const Bf16* row, int64_t pair) const {
    constexpr int64_t channels = 2 * Lanes<float>::count;
    Bf16 buffer[channels] = {};
    const int64_t left = shape_.channels - 2 * pair;
    if (left >= channels) return load_vector<Vec<float>>(row + 2 * pair);
    std::memcpy(static_cast<void*>(buffer), row + 2 * pair, sizeof(Bf16) * size_t(left));
    return load_vector<Vec<float>>(buffer);
  }
  const Shape& shape_;
  float sign_;
  int64_t pairs_;
  Layout<float> layout_;
  Scratch<float> queries_, keys_, values_;
};
#endif

}  // namespace
}  // namespace CEIT_CAPABILITY
}  // namespace ceit::attention
