// Transformer blocks of CeiT at inference in float32 or bfloat16, with weights in panels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../add_norm/calls.h"
#include "../attention/calls.h"
#include "../leff/bands.h"
#include "../panels/panels.h"

namespace ceit::block {

using panels::floats;

// A LayerNorm of rows; its parameters are float32.
class Norm {
 public:
  Norm(const std::optional<torch::stable::Tensor>& weight, const std::optional<torch::stable::Tensor>& bias, double eps,
       int64_t channels);
  // out = the norm of rows `begin` to `end` of x.
  template <class T>
  void operator()(const T* x, T* out, int64_t begin, int64_t end) const;

 private:
  add_norm::ForwardCall call_{};
};

// Attention of the first `queries` of `tokens` tokens of each image: attended (images, queries, channels).
template <class T>
attention::ForwardCall attention_call(int64_t images, int64_t tokens, int64_t queries, int64_t channels, int64_t heads,
                                      double scale, const T* qkv, T* attended);
template <class T>
void attend(const attention::ForwardCall& call, int64_t begin, int64_t end);
inline int64_t tasks_of(const attention::ForwardCall& call) {
  return call.shape.images * call.shape.heads * call.shape.blocks();
}

// What all blocks begin with. Products are without their rows.
template <class T>
struct Attention {
  Norm norm1, norm2;
  int64_t heads;
  double scale;
  panels::Call<T> qkv, projection;
};

// out (images, rows, C) of an encoder block from x of the same shape.
template <class T>
void infer_encoder(const Attention<T>& attention, const leff::Bands<T>& leff, int64_t images, int64_t rows, const T* x,
                   T* out);

// A row for each image.
template <class T>
struct Rows {
  T* start;
  int64_t stride;
  T* of(int64_t image) const { return start + image * stride; }
};

// The class token of an encoder block that passes it unchanged through LeFF.
template <class T>
void infer_class_token(const Attention<T>& attention, int64_t images, int64_t rows, int64_t channels, const T* x,
                       Rows<T> out);

// out (images, C) of the block over class tokens, the last of x (images, layers, C) asking.
template <class T>
void infer_layers(const Attention<T>& attention, panels::Call<T> expanding, panels::Call<T> contracting, int64_t images,
                  int64_t layers, int64_t channels, const T* x, T* out);

// A map (map_height, map_width, channels) of an image, and its patches.
struct Patches {
  int64_t map_height, map_width, channels, height, width;
};

// out (images, 1 + tokens, C): `class_token` (C), then the projections of patches, and `positions` (1 + tokens, C) added.
template <class T>
void infer_patches(const Patches& patches, panels::Call<T> projection, int64_t images, const T* map,
                   const T* class_token, const T* positions, T* out);

}  // namespace ceit::block
