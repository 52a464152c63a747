// The head of a model for segmentation at inference: projections of several maps, upsampled to the size of the first
// and added, then an activation and a classifier of pixels; a few pixels at a time. The schema is in
// ceit_kernels/linear.
#include "../capability.h"
#include "../gemm/packing.h"
#include "calls.h"

namespace ceit::convnet {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

// Pixels at a time: their sums stay in the second level of cache.
constexpr int64_t kHeadPixels = 96;

// Classes (B, H, W, L) of x (B, H, W, C) by a projection with weight (D, C) and shift (D,), of projected maps
// (B, h, w, D), and of a classifier with weight (L, D) and bias (L,).
Tensor head(Tensor x, std::vector<OptionalTensor> projection, std::vector<OptionalTensor> maps, int64_t activation,
            std::vector<OptionalTensor> classifier) {
  STD_TORCH_CHECK(x.dim() == 4 && projection.size() == 2 && classifier.size() == 2 && projection[0] && classifier[0],
                  "x, projection, classifier: expected images, and weights with biases");
  STD_TORCH_CHECK(maps.size() <= size_t(kMostUpsampled), "maps: expected at most ", kMostUpsampled);
  const int64_t images = x.size(0), height = x.size(1), width = x.size(2), pixels = height * width;
  const int64_t depth = x.size(3), channels = projection[0]->size(0), classes = classifier[0]->size(0);
  const Tensor out = new_empty(x, {images, height, width, classes});
  with_dtype(x, [&](auto type) {
    using T = decltype(type);
    struct Gemms {
      gemm::Call<T> project, classify;
    };
    const auto make = [&](gemm::Packer<T>& packer) {
      const gemm::Call<T> project = packer.linear(channels, depth);
      return Gemms{project, packer.linear(classes, channels)};
    };
    const T* from = elements<T>("x", x, images * pixels * depth);
    T* to = static_cast<T*>(out.data_ptr());
    AddUpsampledCall added{height, width, channels, int(maps.size()), {}, gemm::activation_of(activation), nullptr};
    for (size_t i = 0; i < maps.size(); ++i) {
      STD_TORCH_CHECK(maps[i] && maps[i]->dim() == 4, "maps: expected images");
      const int64_t rows = maps[i]->size(1), columns = maps[i]->size(2);
      added.maps[i] = {elements<T>("maps", *maps[i], images * rows * columns * channels), rows, columns};
    }
    gemm::with_prepacked<T>({projection[0], projection[1], classifier[0], classifier[1]}, {}, make, [&](Gemms gemms) {
      const int64_t tasks = ceil_div(pixels, kHeadPixels);
      torch::stable::parallel_for(0, images * tasks, 1, [&](int64_t begin, int64_t end) {
        T* sums = static_cast<T*>(gemm::task_workspace(kHeadPixels * channels * int64_t(sizeof(T))));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t image = task / tasks, first = task % tasks * kHeadPixels;
          const int64_t at = image * pixels + first, count = std::min(pixels - first, kHeadPixels);
          gemm::multiply(gemm::call_of(gemms.project, from + at * depth, sums), 0, count);
          AddUpsampledCall call = added;
          call.out = sums;
          for (int i = 0; i < call.count; ++i) {
            Upsampled& map = call.maps[i];
            map.x = static_cast<const T*>(map.x) + image * map.height * map.width * channels;
          }
          chosen(kIndex<T>).add_upsampled(call, first, first + count);
          gemm::multiply(gemm::call_of(gemms.classify, sums, to + at * classes), 0, count);
        }
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace ceit::convnet

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) { m.impl("_segmentation_head", TORCH_BOX(&ceit::convnet::head)); }
