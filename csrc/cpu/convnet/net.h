// Layers of a frozen model at inference, one after another or side by side: each step reads maps and writes one.
#pragma once

#include <array>
#include <variant>

#include "unit.h"

namespace ceit::convnet {

// What a step reads: up to three maps, and what is added to its result.
template <class T>
struct Inputs {
  std::array<const T*, 3> data;
  const T* added;
};
using Maps = std::array<Map, 3>;

// Convolutional or linear layers.
template <class T>
struct Layers {
  Unit<T> unit;
  Layers(Numbers& numbers, gemm::Packer<T>& packer) : unit(numbers, packer) {}
  Map map(const Maps& in) const { return unit.map(in[0]); }
  int64_t memory(const Maps& in) const { return unit.memory(in[0]); }
  template <class Run>
  void infer(const Maps& in, const Inputs<T>& x, T* memory, T* out, const Run& run) const {
    unit.infer(in[0], x.data[0], x.added, memory, out, run);
  }
};

// LayerNorm of each pixel. Numbers: channels, and the side of windows, whose pixels lie side by side in the result; 0
// for none. Parameters: weight, bias, eps.
template <class T>
struct Norm {
  int64_t channels, window;
  const acc_t<T>*weight, *bias, *eps;
  Norm(Numbers& numbers, gemm::Packer<T>& packer);
  Map map(const Maps& in) const { return in[0]; }
  int64_t memory(const Maps&) const { return 0; }
  template <class Run>
  void infer(const Maps& in, const Inputs<T>& x, T* memory, T* out, const Run& run) const;
};

// Attention of a map of queries to maps of keys and values. Numbers: heads, channels of a head's keys and of its
// values, the side of windows within which it is (0 for none; its result is in the order of the image), queries and
// keys that biases are for (0 where there are none), whether heads are mixed; then, for queries, keys and values, the
// first channel and the channels from one head to the next. Parameters: scale, biases (heads, queries, keys); and,
// where heads are mixed ahead of the softmax and behind it, weights (heads, heads) of both, and what is added behind
// it.
template <class T>
struct Attention {
  struct Part {
    int64_t first, head;
  };
  int64_t heads, channels, value_channels, window, queries, keys;
  bool mixes;
  std::array<Part, 3> parts;
  const acc_t<T>*scale, *before = nullptr, *after = nullptr, *added = nullptr;
  const T* bias = nullptr;
  Attention(Numbers& numbers, gemm::Packer<T>& packer);
  Map map(const Maps& in) const { return {in[0].height, in[0].width, heads * value_channels}; }
  int64_t memory(const Maps& in) const;
  template <class Run>
  void infer(const Maps& in, const Inputs<T>& x, T* memory, T* out, const Run& run) const;

 private:
  bool by_steps() const { return mixes || channels != value_channels; }
};

// Bilinear upsampling, and an activation. Numbers: the factor, the activation.
template <class T>
struct Upsample {
  int64_t factor;
  Activation activation;
  Upsample(Numbers& numbers, gemm::Packer<T>&)
      : factor(numbers.next()), activation(gemm::activation_of(numbers.next())) {}
  Map map(const Maps& in) const { return {in[0].height * factor, in[0].width * factor, in[0].channels}; }
  int64_t memory(const Maps&) const { return 0; }
  template <class Run>
  void infer(const Maps& in, const Inputs<T>& x, T* memory, T* out, const Run& run) const;
};

// The mean of all pixels, and what a norm makes of it. Numbers: channels. Parameters: scale and shift.
template <class T>
struct Pool {
  int64_t channels;
  const acc_t<T>*scale, *shift;
  Pool(Numbers& numbers, gemm::Packer<T>& packer)
      : channels(numbers.next()), scale(packer.vector("scale", channels, 1)), shift(packer.vector("shift", channels)) {}
  Map map(const Maps& in) const { return {1, 1, in[0].channels}; }
  int64_t memory(const Maps& in) const { return sums_elements<T>(in[0]); }
  template <class Run>
  void infer(const Maps& in, const Inputs<T>& x, T* memory, T* out, const Run& run) const;
};

// Numbers: the kind, the slots of what is written, added and read (-1 for none), and those of the kind.
template <class T>
struct Step {
  int64_t to, added;
  std::array<int64_t, 3> from;
  std::variant<Layers<T>, Norm<T>, Attention<T>, Upsample<T>, Pool<T>> what;
};

// Numbers: how many slots of memory there are, then the steps. The first slot has the input, the second the result.
template <class T>
class Net {
 public:
  Net(const std::vector<int64_t>& sizes, gemm::Packer<T>& packer);
  Map map(const Map& in) const { return plan(in).maps[1]; }
  // Elements of an image's memory.
  int64_t memory(const Map& in) const { return plan(in).elements; }
  // One image, from `x` to `out`, which are (channels, pixels) where they are planar.
  template <class Run>
  void infer(const Map& in, bool planar, const T* x, T* memory, T* out, const Run& run) const;

 private:
  // The maps in the slots at the end, where the slots begin, and what the steps have beside them.
  struct Plan {
    std::vector<Map> maps;
    std::vector<int64_t> starts;
    int64_t elements;
  };
  Plan plan(const Map& in) const;
  Maps read(const std::vector<Map>& maps, const Step<T>& step) const;
  size_t slots_;
  std::vector<Step<T>> steps_;
};

}  // namespace ceit::convnet
