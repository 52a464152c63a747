// Parameters as kernels read them: vectors in the type accumulated in, weights packed. Made in the call that uses them,
// or once for a frozen module; in memory that is handed out piece by piece.
#pragma once

#include <cmath>
#include <vector>

#include "gemm.h"

namespace ceit::gemm {

inline Tensor contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Copies the elements of a floating-point tensor, so many.
template <class Acc>
void read_vector(const char* name, const Tensor& tensor, int64_t count, Acc* to);

// The epilogue of a frozen norm, for each column: z * scale + shift.
template <class T>
struct Affine {
  const acc_t<T>*scale, *shift;
};

// Takes parameters one after another and makes of them what kernels read. Without parameters it finds what was made of
// them in the same order.
template <class T>
class Packer {
 public:
  using Acc = acc_t<T>;
  Packer(Arena& arena, const std::vector<OptionalTensor>* parameters) : arena_(arena), parameters_(parameters) {}

  // A vector, or `otherwise` for each element where there is none.
  const Acc* vector(const char* name, int64_t count, Acc otherwise = 0) {
    Acc* to = arena_.take<Acc>(count);
    if (fills()) {
      const OptionalTensor tensor = next();
      if (tensor)
        read_vector(name, *tensor, count, to);
      else
        std::fill_n(to, count, otherwise);
    }
    return to;
  }

  // Elements as they are.
  const T* copy(const char* name, int64_t count) {
    T* to = arena_.take<T>(count);
    if (fills()) std::copy_n(whole(name, count), count, to);
    return to;
  }

  // The bias of a convolution and the frozen norm behind it (weight, bias, mean, variance; none where it has no mean).
  Affine<T> norm(int64_t channels, double eps) {
    Acc *scale = arena_.take<Acc>(channels), *shift = arena_.take<Acc>(channels);
    if (!fills()) return {scale, shift};
    std::vector<Acc> vectors[5];
    const char* names[] = {"bias", "norm_weight", "norm_bias", "running_mean", "running_var"};
    for (int i = 0; i < 5; ++i) {
      const OptionalTensor tensor = next();
      vectors[i].assign(size_t(channels), Acc(i == 1 || i == 4 ? 1 : 0));
      if (tensor) read_vector(names[i], *tensor, channels, vectors[i].data());
      if (i == 4 && !tensor) eps = 0;  // no norm
    }
    for (size_t c = 0; c < size_t(channels); ++c) {
      scale[c] = vectors[1][c] / std::sqrt(vectors[4][c] + Acc(eps));
      shift[c] = (vectors[0][c] - vectors[3][c]) * scale[c] + vectors[2][c];
    }
    return {scale, shift};
  }

  // A weight (columns, depth), or B itself; its epilogue is left to the caller.
  Call<T> weight(const char* name, int64_t columns, int64_t depth, bool is_b = false) {
    return packed(fills() ? whole(name, columns * depth) : nullptr, columns, depth, is_b);
  }
  // A weight that the caller has put in order.
  Call<T> packed(const T* weight, int64_t columns, int64_t depth, bool is_b = false) {
    void* to = arena_.take_bytes(packed_bytes<T>(columns, depth));
    if (fills()) pack(Weight<T>{weight, columns, depth, is_b}, to);
    Call<T> call;
    call.b = to, call.depth = call.a_stride = depth, call.columns = call.out_stride = columns;
    return call;
  }
  // A linear layer, of weight and bias.
  Call<T> linear(int64_t columns, int64_t depth) {
    Call<T> call = weight("weight", columns, depth);
    call.shift = vector("bias", columns);
    return call;
  }

  // The contiguous elements of the next parameter, rounded if they are not of this type; they live as long as this.
  const T* whole(const char* name, int64_t count) {
    const OptionalTensor tensor = next();
    STD_TORCH_CHECK(tensor.has_value(), name, ": expected a tensor");
    const bool rounds = tensor->scalar_type() != kDtype<T>;
    kept_.push_back(gemm::contiguous(rounds ? torch::stable::to(*tensor, kDtype<T>) : *tensor));
    return elements<T>(name, kept_.back(), count);
  }
  bool fills() const { return parameters_ && !arena_.counts(); }
  Arena& arena() { return arena_; }

 private:
  OptionalTensor next() {
    STD_TORCH_CHECK(next_ < parameters_->size(), "parameters: expected more than ", parameters_->size());
    return (*parameters_)[next_++];
  }
  Arena& arena_;
  const std::vector<OptionalTensor>* parameters_;
  size_t next_ = 0;
  std::vector<Tensor> kept_;
};

// Calls use(made) with what make(Packer<T>&) returns: of parameters, in memory of this thread; or, without any, of what
// `prepack` made of them.
template <class T, class Make, class Use>
void with_prepacked(const std::vector<OptionalTensor>& parameters, const OptionalTensor& prepacked, const Make& make,
                    const Use& use) {
  Arena counting;
  Packer<T> counter(counting, nullptr);
  make(counter);
  if (prepacked) {
    Arena arena(elements("prepacked", prepacked, counting.bytes(), ScalarType::Byte));
    Packer<T> found(arena, nullptr);
    return use(make(found));
  }
  Arena arena(packing_workspace(counting.bytes()));
  Packer<T> packer(arena, &parameters);
  use(make(packer));
}

// What `with_prepacked` reads again, in memory of its own, a tensor (bytes,) beside `like`.
template <class T, class Make>
Tensor prepack(const Tensor& like, const std::vector<OptionalTensor>& parameters, const Make& make) {
  Arena counting;
  Packer<T> counter(counting, nullptr);
  make(counter);
  const Tensor packed = new_empty(like, {counting.bytes()}, ScalarType::Byte);
  Arena arena(packed.data_ptr());
  Packer<T> packer(arena, &parameters);
  make(packer);
  return packed;
}

// Calls use(Call<T>) with a linear layer's GEMM but for its rows, of weight (columns, depth) and bias.
template <class T, class Use>
void with_linear(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& prepacked, int64_t columns,
                 int64_t depth, const Use& use) {
  with_prepacked<T>({weight, bias}, prepacked, [&](Packer<T>& packer) { return packer.linear(columns, depth); }, use);
}

}  // namespace ceit::gemm
