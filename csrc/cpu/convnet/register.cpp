// Inference of convolutional layers and its registration. The schemas are in ceit_kernels/convnet.
#include "net.h"

namespace ceit::convnet {
namespace {

// What layers make of images x, contiguous (B, H, W, C) or, where they are planar, (B, C, H, W); in the order of x.
Tensor infer(Tensor x, Tensor prepacked, std::vector<int64_t> sizes, bool planar) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x: expected images");
  const int64_t images = x.size(0), first = planar ? 2 : 1;
  const Map in{x.size(first), x.size(first + 1), x.size(planar ? 1 : 3)};
  return with_dtype(x, [&](auto type) {
    using T = decltype(type);
    std::optional<Tensor> out;
    const auto make = [&](gemm::Packer<T>& packer) { return Net<T>(sizes, packer); };
    gemm::with_prepacked<T>({}, prepacked, make, [&](const Net<T>& net) {
      const Map map = net.map(in);
      out = planar ? new_empty(x, {images, map.channels, map.height, map.width})
                   : new_empty(x, {images, map.height, map.width, map.channels});
      const T* from = elements<T>("x", x, images * in.elements());
      T* to = static_cast<T*>(out->data_ptr());
      gemm::for_images(images, net.memory(in) * int64_t(sizeof(T)), [&](int64_t image, gemm::Place place, auto run) {
        net.infer(in, planar, from + image * in.elements(), static_cast<T*>(place.memory), to + image * map.elements(),
                  run);
      });
    });
    return *out;
  });
}

Tensor prepack(Tensor like, std::vector<OptionalTensor> parameters, std::vector<int64_t> sizes) {
  return with_dtype(like, [&](auto type) {
    using T = decltype(type);
    return gemm::prepack<T>(like, parameters, [&](gemm::Packer<T>& packer) { return Net<T>(sizes, packer); });
  });
}

// Asks for Python's objects, which are out of cache behind a call, all at once: one by one they are waited for. Pairs
// of an address and the lines that a dict's table takes, which is where one of two words of a dict points to.
void fetch(Tensor addresses) {
  constexpr int64_t line = 64, words[] = {4, 5};
  const int64_t count = addresses.numel() / 2;
  const auto* pairs = static_cast<const int64_t*>(addresses.data_ptr());
  const auto ask = [](const void* at) { __builtin_prefetch(at, 0, 2); };
  for (int64_t i = 0; i < count; ++i) ask(reinterpret_cast<const void*>(pairs[2 * i]));
  for (int64_t i = 0; i < count; ++i) {
    const auto* object = reinterpret_cast<const char* const*>(pairs[2 * i]);
    for (const int64_t word : words)
      for (int64_t k = 0; k < pairs[2 * i + 1]; ++k) ask(object[word] + k * line);
  }
}

}  // namespace
}  // namespace ceit::convnet

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_convnet_infer", TORCH_BOX(&ceit::convnet::infer));
  m.impl("_convnet_fetch", TORCH_BOX(&ceit::convnet::fetch));
  m.impl("_convnet_prepack", TORCH_BOX(&ceit::convnet::prepack));
}
