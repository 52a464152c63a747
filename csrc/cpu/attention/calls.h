// What self-attention takes on the CPU, and the table of its implementations.
#pragma once

#include "../../types.h"

namespace ceit::attention {

// Queries that are worked on together, at most: a multiple of the rows of every tile. Their scores stay in cache.
constexpr int kQueries = 48;

struct Shape {
  int64_t images, tokens, heads, channels;  // channels of a head
  int64_t queries;                          // in self-attention the first tokens
  int64_t all_queries() const { return images * heads * queries; }
};

// Queries, keys or values (images, heads, tokens, channels), with the strides of the first three.
struct Operand {
  const void* data;
  int64_t offset, image, head, token;  // elements
};

// Part 0, 1 or 2 of qkv (B, tokens, 3, heads, channels).
inline Operand part_of(const void* qkv, const Shape& shape, int part) {
  const int64_t row = shape.heads * shape.channels;
  return {qkv, part * row, shape.tokens * 3 * row, shape.channels, 3 * row};
}

// out = softmax(scale * q k^T + bias) v. Statistics are, for each query, the largest of its scores as they are
// compared, and the sum of the exponentials of all relative to it, from which backward gets its weights again without a
// rounding more.
struct ForwardCall {
  Shape shape;
  double scale;
  Operand q, k, v;
  const void* bias;  // (heads, queries, tokens) or null
  void* out;         // (B, queries, heads, channels)
  void* statistics;  // (B, heads, queries, 2), of the type that is computed in; or null
  // Where images are square windows of a larger image: their side and its width; out is in its order. Else 0.
  int64_t window, width;
};

// Attention of one image in three steps, with the scores of all heads in memory: of heads that are mixed by weights
// (heads, heads) ahead of the softmax and behind it ("talking heads", Shazeer et al., 2020), or whose values have other
// channels than their keys.
struct MixedCall {
  Shape shape;
  int64_t value_channels;
  double scale;
  Operand q, k, v;
  const void* bias;                    // (heads, queries, tokens), added behind the first weights; or null
  const void *before, *after, *added;  // weights, and what is added behind the second (heads,); or null
  void* scores;                        // of the type that is computed in, as those are
  void* out;                           // (queries, heads, value_channels)
};

// Of the scores: elements of a row, rows of a head, and elements of all heads. Kernels round up to whole tiles.
constexpr int64_t score_stride(int64_t tokens) { return (ceil_div(tokens, 16) | 1) * 16; }
constexpr int64_t score_rows(int64_t queries) { return ceil_div(queries, 24) * 24; }
constexpr int64_t scores_of(int64_t heads, int64_t queries, int64_t tokens) {
  return heads * score_rows(queries) * score_stride(tokens);
}

struct MixedKernels {
  Kernel<MixedCall> score;    // tasks: heads
  Kernel<MixedCall> softmax;  // tasks: queries
  Kernel<MixedCall> weigh;    // tasks: heads
};

struct BackwardCall {
  Shape shape;
  double scale;
  const void* grad_out;  // (B, queries, heads, channels)
  const void* qkv;
  const void* statistics;
  void* grad_qkv;  // (B, tokens, 3, heads, channels)
};

struct Kernels {
  Kernel<ForwardCall> forward;    // tasks: queries of all heads of all images
  Kernel<BackwardCall> backward;  // tasks: heads of all images
};

}  // namespace ceit::attention
