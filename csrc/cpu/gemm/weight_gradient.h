// The gradient of a weight, image by image.
#pragma once

#include "gemm.h"

namespace ceit::gemm {

// The sum over images of A^T B for their tokens' rows A (tokens, rows) and B (tokens, columns), of which B comes in
// parts: each thread has a sum of its own, the first that of all in the end.
template <class T>
class WeightGradient {
 public:
  using Acc = acc_t<T>;
  // Takes its part of each thread's memory from `counting`; nothing unless it is wanted.
  WeightGradient(bool wanted, const Tensor& like, int64_t rows, int64_t columns, int64_t tokens, Arena& counting)
      : wanted_(wanted),
        rows_(rows),
        columns_(columns),
        tokens_(tokens),
        offset_(counting.bytes()),
        sum_(new_empty(like, {wanted ? rows : 0, columns}, kDtype<Acc>)) {
    if (wanted) take_memory(counting);
  }

  class OfImage {
   public:
    // Adds columns `first` to `first + count`, of B with rows `stride` apart.
    void add(int64_t first, int64_t count, const T* b, int64_t stride) const {
      if (!all_.wanted_) return;
      Call<T, Acc> call = unpacked_call<T, Acc>(b, stride, all_.tokens_, count);
      call.a = a_, call.a_stride = transposed_stride(all_.tokens_);
      call.out = sum_ + first, call.out_stride = all_.columns_, call.accumulate = accumulate_;
      multiply(call, 0, all_.rows_);
    }

   private:
    friend class WeightGradient;
    explicit OfImage(const WeightGradient& all) : all_(all) {}
    const WeightGradient& all_;
    Acc* sum_ = nullptr;
    T* a_ = nullptr;
    bool accumulate_ = false;
  };

  // Of an image with A, where it is worked on.
  OfImage of_image(const Place& place, const T* a) const {
    OfImage image(*this);
    if (!wanted_) return image;
    Arena memory(static_cast<char*>(place.memory) + offset_);
    const auto [own, transposed] = take_memory(memory);
    image.sum_ = place.thread ? own : sum();
    image.a_ = transposed, image.accumulate_ = !place.first;
    transpose(a, tokens_, rows_, transposed);
    return image;
  }

  // The sum (rows, columns), with what threads beyond the first have left in their memory.
  Tensor take(const Memory& memory) const {
    Acc* to = sum();
    torch::stable::parallel_for(0, sum_.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t thread = 1; thread < memory.threads; ++thread) {
        const Acc* from = reinterpret_cast<const Acc*>(static_cast<char*>(memory.of(thread)) + offset_);
        for (int64_t i = begin; i < end; ++i) to[i] += from[i];
      }
    });
    return sum_;
  }

 private:
  struct Parts {
    Acc* sum;
    T* transposed;
  };
  Parts take_memory(Arena& memory) const {
    Acc* sum = memory.take<Acc>(rows_ * columns_);
    return {sum, memory.take<T>(rows_ * transposed_stride(tokens_))};
  }
  Acc* sum() const { return static_cast<Acc*>(sum_.data_ptr()); }
  bool wanted_;
  int64_t rows_, columns_, tokens_, offset_;
  Tensor sum_;
};

}  // namespace ceit::gemm
