// LeFF's matrix products with the stages around them, a few images at a time, so that hidden tokens stay in cache.
#include <algorithm>

#include "../products.h"
#include "bands.h"
#include "stages.h"
#include "training_bands.h"

namespace ceit::leff {
namespace {

using torch::stable::narrow;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::view;

// Calls body(start, count) for the images of a batch, some at a time.
template <class Body>
void in_parts(int64_t batch, int64_t images, Body body) {
  STD_TORCH_CHECK(images > 0, "images: expected a positive number, got ", images);
  for (int64_t start = 0; start < batch; start += images) body(start, std::min(images, batch - start));
}

// Images `start` to `start + count` of (B, rows, channels).
Tensor images_of(const Tensor& tensor, int64_t start, int64_t count) {
  if (start == 0 && count == tensor.size(0)) return tensor;
  Tensor whole = tensor;
  return narrow(whole, 0, start, count);
}

// The matrix whose rows are the tokens of a contiguous (B, rows, channels).
Tensor matrix(const Tensor& tensor) { return view(tensor, {tensor.size(0) * tensor.size(1), tensor.size(2)}); }

// A matrix of tokens as the images that they are of.
Tensor as_images(const Tensor& rows, int64_t images) {
  return view(rows, {images, rows.size(0) / images, rows.size(1)});
}

Tensor transposed(const Tensor& in) {
  Tensor out = new_empty(in, {in.size(1), in.size(0)});
  transpose(in, out);
  return out;
}

// Sums of matrices, kept in the type of sums.
class WeightGradient {
 public:
  WeightGradient(bool wanted, const Tensor& like) : wanted_(wanted), sum_(new_empty(like, {0})) {}
  // Adds A^T B, of which A is copied transposed.
  void add(const Tensor& a, const Tensor& b) {
    if (!wanted_) return;
    const Tensor part = torch::stable::to(product(transposed(a), b), real_type(b));
    if (first_)
      sum_ = part;
    else if (part.scalar_type() == ScalarType::Double)
      add_to_sum<double>(part);
    else
      add_to_sum<float>(part);
    first_ = false;
  }
  Tensor take() const { return sum_; }

 private:
  template <class Real>
  void add_to_sum(const Tensor& part) {
    Real* sum = static_cast<Real*>(sum_.data_ptr());
    const Real* from = static_cast<const Real*>(part.data_ptr());
    torch::stable::parallel_for(0, part.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum[i] += from[i];
    });
  }

  bool wanted_, first_ = true;
  Tensor sum_;
};

Sizes sizes_of(const std::vector<double>& eps, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 8 && eps.size() == 3, "sizes, eps: expected 8 and 3 numbers");
  return {sizes[0],
          sizes[1],
          sizes[2],
          0,
          int(sizes[6]),
          int(sizes[7]),
          int(sizes[3]),
          checked_activation(sizes[4]),
          checked_activation(sizes[5]),
          {eps[0], eps[1], eps[2]}};
}

}  // namespace

void infer(Tensor x, std::vector<OptionalTensor> parameters, OptionalTensor packed, OptionalTensor residual,
           std::vector<double> eps, std::vector<int64_t> sizes, Tensor out) {
  Sizes size = sizes_of(eps, sizes);
  const int64_t batch = x.size(0), rows = x.size(1), tokens = int64_t(size.height) * size.width;
  STD_TORCH_CHECK(x.dim() == 3 && out.dim() == 3 && rows >= tokens && (rows == tokens || size.channels == size.outputs),
                  "x: expected (B, rows, C) with the image's rows last, and as wide as out where there are others");
  size.prefix = rows - tokens;
  gemm::with_type(x, [&](auto type) {
    using T = decltype(type);
    const T* from = gemm::elements<T>("x", x, batch * rows * size.channels);
    T* to = gemm::elements<T>("out", out, batch * rows * size.outputs);
    const T* rest = gemm::elements<T>("residual", residual, out.numel());
    const auto make = [&](gemm::Packer<T>& packer) { return Bands<T>(size, packer); };
    gemm::with_packed<T>(parameters, packed, make, [&](const Bands<T>& bands) {
      const int64_t floats = gemm::floats_for<T>(bands.memory());
      gemm::for_images(batch, floats, [&](int64_t image, gemm::Place place, auto run) {
        T* memory = reinterpret_cast<T*>(place.memory);
        const T* in = from + image * rows * size.channels;
        const int64_t start = image * rows * size.outputs;
        run(tokens, [&](int64_t begin, int64_t end) { bands.expand(in, memory, begin, end); });
        run(size.height, [&](int64_t begin, int64_t end) {
          bands.contract(in, rest ? rest + start : nullptr, memory, to + start, begin, end);
        });
      });
    });
  });
}

Tensor pack(Tensor like, std::vector<OptionalTensor> parameters, std::vector<double> eps, std::vector<int64_t> sizes) {
  const Sizes size = sizes_of(eps, sizes);
  Tensor packed = like;
  gemm::with_type(like, [&](auto type) {
    using T = decltype(type);
    packed = gemm::packed_tensor<T>(like, parameters, [&](gemm::Packer<T>& packer) { return Bands<T>(size, packer); });
  });
  return packed;
}

Tensor expand(Tensor x, Tensor weight, OptionalTensor bias, int64_t tokens, OptionalTensor moments) {
  if (has_bands(x)) return expand_by_bands(x, weight, bias, tokens, moments);
  const Tensor z1 = as_images(product(matrix(x), transposed(weight), bias), x.size(0));
  if (moments) leff::moments(z1, tokens, *moments);
  return z1;
}

Tensor contract(Tensor z2, OptionalTensor norm, int64_t activation, Tensor weight, OptionalTensor bias, int64_t images,
                OptionalTensor moments) {
  if (has_bands(z2)) return contract_by_bands(z2, norm, activation, weight, bias, moments);
  const int64_t batch = z2.size(0), tokens = z2.size(1);
  const Tensor a2 = new_empty(z2, {std::min(images, batch), tokens, z2.size(2)});
  Tensor z3 = a2;
  if (images < batch) z3 = new_empty(z2, {batch, tokens, weight.size(0)});
  in_parts(batch, images, [&](int64_t start, int64_t count) {
    const Tensor part = images_of(a2, 0, count);
    activate(images_of(z2, start, count), norm, activation, tokens, part);
    const Tensor result = as_images(linear(matrix(part), weight, bias), count);
    if (images < batch) {
      Tensor target = images_of(z3, start, count);
      torch::stable::copy_(target, result);
    } else {
      z3 = result;
    }
  });
  if (moments) leff::moments(z3, tokens, *moments);
  return z3;
}

Tensor contract_backward(Tensor dz3, Tensor weight, Tensor z2, OptionalTensor norm, int64_t activation, int64_t images,
                         bool need_weight, Tensor g2, Tensor sums) {
  if (has_bands(z2)) return contract_backward_by_bands(dz3, weight, z2, norm, activation, need_weight, g2, sums);
  const int64_t batch = z2.size(0), tokens = z2.size(1);
  OptionalTensor a2;
  if (need_weight) a2 = new_empty(z2, {std::min(images, batch), tokens, z2.size(2)});
  WeightGradient dweight(need_weight, sums);
  in_parts(batch, images, [&](int64_t start, int64_t count) {
    const Tensor dz = matrix(images_of(dz3, start, count));
    const Tensor g = as_images(product(dz, weight), count);
    OptionalTensor part;
    if (need_weight) part = images_of(*a2, 0, count);
    activate_backward(g, images_of(z2, start, count), norm, activation, tokens, images_of(g2, start, count), part,
                      images_of(sums, start, count));
    if (need_weight) dweight.add(dz, matrix(*part));
  });
  return dweight.take();
}

std::tuple<Tensor, Tensor> expand_backward(Tensor g1, Tensor z1, OptionalTensor gradient, Tensor x, Tensor weight,
                                           int64_t tokens, int64_t images, bool need_x, bool need_weight) {
  if (has_bands(x)) return expand_backward_by_bands(g1, z1, gradient, x, weight, tokens, need_x, need_weight);
  const int64_t batch = x.size(0);
  const bool whole = images >= batch;
  Tensor dx = new_empty(x, {0});
  if (need_x && !whole) dx = new_empty(x, {batch, x.size(1), x.size(2)});
  WeightGradient dweight(need_weight, g1);
  in_parts(batch, images, [&](int64_t start, int64_t count) {
    const Tensor dz1 = images_of(g1, start, count);
    if (gradient) leff::gradient(dz1, images_of(z1, start, count), gradient, tokens, dz1);
    if (need_x) {
      const Tensor result = as_images(product(matrix(dz1), weight), count);
      if (whole) {
        dx = result;
      } else {
        Tensor target = images_of(dx, start, count);
        torch::stable::copy_(target, result);
      }
    }
    dweight.add(matrix(images_of(x, start, count)), matrix(dz1));
  });
  const Tensor sum = dweight.take();
  return {dx, need_weight ? transposed(sum) : sum};
}

}  // namespace ceit::leff
