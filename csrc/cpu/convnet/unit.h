// Convolutional layers of an image one after another at inference, their weights prepacked and norms folded. Maps are
// (pixels, channels); what layers in a row need of each other goes between them while it is in cache.
#pragma once

#include <optional>
#include <vector>

#include "../gemm/packing.h"
#include "calls.h"

namespace ceit::convnet {

struct Map {
  int64_t height, width, channels;
  int64_t pixels() const { return height * width; }
  int64_t elements() const { return pixels() * channels; }
};

// The sum of all pixels (channels,), in memory for `sums_elements` of them.
template <class T>
int64_t sums_elements(const Map& map) {
  return (map.height + 1) * map.channels * int64_t(sizeof(acc_t<T>) / sizeof(T));
}
template <class T, class Run>
acc_t<T>* sum_pixels(const Map& map, const T* x, T* memory, const Run& run);

// Lists of numbers, read one after another.
class Numbers {
 public:
  explicit Numbers(const std::vector<int64_t>& all) : all_(all) {}
  int64_t next() {
    STD_TORCH_CHECK(at_ < all_.size(), "sizes: expected more than ", all_.size());
    return all_[at_++];
  }
  bool end() const { return at_ == all_.size(); }

 private:
  const std::vector<int64_t>& all_;
  size_t at_ = 0;
};

// A convolution, its norm and its activation. Numbers: its kind, input channels, output channels, side, stride,
// padding, activation. Parameters: weight (outputs, side * side * inputs) and scale for a GEMM, else taps with the
// scale in them, (side * side, channels) of a depthwise convolution or (side * side * inputs, outputs) of a direct one;
// and shift.
enum class Kind { gemm, depthwise, direct };

template <class T>
struct Layer {
  Kind kind;
  int64_t in, out;
  int side, stride, padding;
  Activation activation;
  gemm::Call<T> gemm;  // but for the rows
  const acc_t<T>*taps = nullptr, *shift = nullptr;
  Layer(Numbers& numbers, gemm::Packer<T>& packer);
  // A pointwise layer.
  explicit Layer(const gemm::Call<T>& call);
  // A depthwise one that keeps the size.
  Layer(int64_t channels, int side, Activation activation, const acc_t<T>* taps, const acc_t<T>* shift);
  bool depthwise() const { return kind == Kind::depthwise; }
  int64_t depth() const { return side * side * in; }
  Map map(const Map& of) const { return {size(of.height), size(of.width), out}; }

 private:
  int64_t size(int64_t of) const {
    const int64_t padded = of + 2 * padding;
    STD_TORCH_CHECK(padded >= side, "x: expected images of which a convolution of side ", side, " gets at least ", side,
                    " pixels with its padding, got ", padded);
    return (padded - side) / stride + 1;
  }
};

// Squeeze-and-excitation: what two linear layers and a sigmoid make of the mean of each channel multiplies it. Numbers:
// whether it is a hardsigmoid, those of the layers.
template <class T>
struct Gate {
  bool hard;
  Layer<T> reducing, expanding;
  Gate(Numbers& numbers, gemm::Packer<T>& packer)
      : hard(numbers.next() != 0), reducing(numbers, packer), expanding(numbers, packer) {}
};

// Layers of which no result is needed but the last: a pointwise one, one that mixes neighbours and a pointwise one, of
// which some may be missing; or a gate and a pointwise one. Numbers: which there are (bits), the activation behind what
// is added to the result; then those of the layers.
template <class T>
struct Unit {
  std::optional<Layer<T>> expanding, mixing, contracting;
  std::optional<Gate<T>> gate;
  Activation after;
  Unit(Numbers& numbers, gemm::Packer<T>& packer);
  Unit(const Layer<T>& expanding, const Layer<T>& mixing, const Layer<T>& contracting)
      : expanding(expanding), mixing(mixing), contracting(contracting), after(Activation::identity) {}
  Map hidden(const Map& in) const { return expanding ? expanding->map(in) : in; }
  Map mixed(const Map& in) const { return mixing ? mixing->map(hidden(in)) : hidden(in); }
  Map map(const Map& in) const { return contracting ? contracting->map(mixed(in)) : mixed(in); }
  // Elements of an image's memory.
  int64_t memory(const Map& in) const {
    if (gate) return sums_elements<T>(in) + 2 * in.channels + gate->reducing.out;
    return expanding ? hidden(in).elements() : 0;
  }
  // out = the layers of x (pixels, channels), plus the residual if there is one.
  template <class Run>
  void infer(const Map& in, const T* x, const T* residual, T* memory, T* out, const Run& run) const;
};

// Between planes (channels, pixels) and (pixels, channels).
template <class T, class Run>
void from_planes(const T* planes, const Map& map, T* pixels, const Run& run);
template <class T, class Run>
void to_planes(const T* pixels, const Map& map, T* planes, const Run& run);

}  // namespace ceit::convnet
