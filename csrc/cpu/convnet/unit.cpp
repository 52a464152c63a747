#include "unit.h"

#include "../capability.h"
#include "../scalar.h"
#include "patches.h"

namespace ceit::convnet {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)
namespace depthwise {
CEIT_DECLARE_TABLE(Kernel<DepthwiseCall>, kernels, 3)
}
namespace direct {
CEIT_DECLARE_TABLE(Kernel<DirectCall>, kernels, 3)
}

namespace {

// Of a thread: hidden pixels that are kept for the convolution behind them, and its results or patches for the GEMM
// behind those. Together with weights they stay in the second level of cache.
constexpr int64_t kHiddenBytes = 256 << 10, kTileBytes = 128 << 10;
// Of a thread: hidden pixels between two GEMMs.
constexpr int64_t kPairBytes = 384 << 10;
// Pixels for which weights are read, at least, and the hidden pixels that may be kept for as many.
constexpr int64_t kLeastPixels = 64, kMostHiddenBytes = 448 << 10;
// Pixels of an image in planes that are transposed at a time.
constexpr int64_t kPlanePixels = 96;

template <class T>
int64_t fitting(int64_t bytes, int64_t elements) {
  return std::max<int64_t>(1, bytes / (elements * int64_t(sizeof(T))));
}

// Runs a unit on one image.
template <class T>
class UnitRun {
 public:
  UnitRun(const Unit<T>& unit, const Map& in, const T* x, const T* residual, T* out)
      : unit_(unit),
        in_(in),
        hidden_(unit.hidden(in)),
        mixed_(unit.mixed(in)),
        result_(unit.map(in)),
        x_(x),
        residual_(residual),
        out_(out) {}

  template <class Run>
  void operator()(T* memory, int64_t threads, const Run& run) const {
    if (unit_.gate) {
      const acc_t<T>* gates = this->gates(memory, run);
      const int64_t step = std::max(kLeastPixels, fitting<T>(kTileBytes, in_.channels));
      return run(in_.pixels(), [&](int64_t begin, int64_t end) {
        T* tile = scratch(std::min(step, end - begin) * in_.channels);
        for (int64_t pixel = begin; pixel < end; pixel += step) gated(gates, pixel, std::min(end, pixel + step), tile);
      });
    }
    if (result_.pixels() == 1 && !unit_.mixing) {  // threads share the columns
      if (unit_.expanding) linear(*unit_.expanding, x_, memory, run);
      linear(*unit_.contracting, unit_.expanding ? memory : x_, out_, run, residual_);
      return activate(0, 1);
    }
    const bool both = unit_.expanding && unit_.mixing;
    if (both && bytes(hidden_.height) > threads * kHiddenBytes && bytes(kept_rows(step_rows())) <= kMostHiddenBytes)
      return run(result_.height, [&](int64_t begin, int64_t end) { stream(begin, end); });
    if (both) run(hidden_.pixels(), [&](int64_t begin, int64_t end) { expand(begin, end, memory); });
    const Rows<const T> rows{both ? memory : x_, hidden_, hidden_.height};
    run(result_.pixels(), [&](int64_t begin, int64_t end) {
      const bool tiled = unit_.expanding || unit_.mixing;
      const int64_t tiles = tiled ? ceil_div(end - begin, tile_pixels()) : 1, step = ceil_div(end - begin, tiles);
      T* tile = tiled ? scratch(step * tile_channels()) : nullptr;
      for (int64_t pixel = begin; pixel < end; pixel += step) finish(rows, pixel, std::min(end, pixel + step), tile);
    });
  }

 private:
  // What multiplies each channel of the input.
  template <class Run>
  const acc_t<T>* gates(T* memory, const Run& run) const {
    using Acc = acc_t<T>;
    const int64_t channels = in_.channels;
    const Gate<T>& gate = *unit_.gate;
    Acc* total = sum_pixels(in_, x_, memory, run);
    T *means = reinterpret_cast<T*>(total + channels), *reduced = means + channels, *x = reduced + gate.reducing.out;
    for (int64_t c = 0; c < channels; ++c) means[c] = rounded<T>(total[c] / Acc(in_.pixels()));
    linear(gate.reducing, means, reduced, run);
    linear(gate.expanding, reduced, x, run);
    chosen(kIndex<T>).gate({gate.hard, x, total}, 0, channels);
    return total;
  }

  template <class Run>
  static void linear(const Layer<T>& layer, const T* x, T* out, const Run& run, const T* residual = nullptr) {
    const gemm::Call<T> call = gemm::call_of(layer.gemm, x, out, residual);
    run(gemm::panels_of(call.columns), [&](int64_t begin, int64_t end) { multiply(call, {0, 1}, {begin, end}); });
  }

  // Pixels `begin` to `end` of the gated input's result.
  void gated(const acc_t<T>* gates, int64_t begin, int64_t end, T* tile) const {
    chosen(kIndex<T>).scale({in_.channels, x_ + begin * in_.channels, gates, tile}, 0, end - begin);
    contract(tile, begin, end);
  }

  void contract(const T* a, int64_t begin, int64_t end) const {
    const int64_t before = begin * result_.channels;
    gemm::multiply(gemm::call_of(unit_.contracting->gemm, a, out_ + before, residual_ ? residual_ + before : nullptr),
                   0, end - begin);
    activate(begin, end);
  }

  // What follows the last layer: the residual where no GEMM has added it, and the activation behind that.
  void activate(int64_t begin, int64_t end) const {
    const T* added = unit_.contracting || unit_.mixing->kind == Kind::gemm ? nullptr : residual_;
    if (unit_.after == Activation::identity && !added) return;
    const int64_t channels = result_.channels;
    chosen(kIndex<T>).activate({unit_.after, added, out_}, begin * channels, end * channels);
  }

  // Rows `begin` to `end` of the result, by a few of them and the hidden rows that they need.
  void stream(int64_t begin, int64_t end) const {
    const Layer<T>& layer = *unit_.mixing;
    const int64_t row = hidden_.width * hidden_.channels, step = step_rows(), kept = kept_rows(step);
    T* memory = scratch(kept * row + step * mixed_.width * tile_channels());
    const Rows<T> rows{memory, hidden_, kept};
    int64_t next = std::max<int64_t>(0, begin * layer.stride - layer.padding);
    for (int64_t y = begin; y < end; y += step) {
      const int64_t last = std::min(end, y + step);
      const int64_t needed = std::min(hidden_.height, (last - 1) * layer.stride - layer.padding + layer.side);
      while (next < needed) {
        const int64_t until = std::min(needed, (next / kept + 1) * kept);
        expand(next * hidden_.width, until * hidden_.width, rows.of(next) - next * row);
        next = until;
      }
      finish({memory, hidden_, kept}, y * mixed_.width, last * mixed_.width, memory + kept * row);
    }
  }

  // Hidden pixels `begin` to `end`, of those that begin at `hidden`.
  void expand(int64_t begin, int64_t end, T* hidden) const {
    gemm::Call<T> call = unit_.expanding->gemm;
    call.a = x_, call.out = hidden;
    gemm::multiply(call, begin, end);
  }

  // Pixels `begin` to `end` of the result; `tile` is for what comes ahead of the last GEMM.
  void finish(const Rows<const T>& hidden, int64_t begin, int64_t end, T* tile) const {
    const int64_t count = end - begin;
    T* to = out_ + begin * result_.channels;
    const T* a = x_ + begin * in_.channels;
    if (unit_.mixing) {
      T* mixed = unit_.contracting ? tile : to;
      if (unit_.mixing->depthwise())
        mix(hidden, begin, end, mixed);
      else
        convolve(hidden, begin, end, mixed, unit_.contracting ? tile + count * mixed_.channels : tile);
      a = mixed;
    } else if (unit_.expanding) {
      expand(begin, end, tile - begin * hidden_.channels);
      a = tile;
    }
    if (unit_.contracting)
      contract(a, begin, end);
    else
      activate(begin, end);
  }

  void mix(const Rows<const T>& hidden, int64_t begin, int64_t end, T* to) const {
    const Layer<T>& layer = *unit_.mixing;
    DepthwiseCall call{hidden_.channels, hidden_.width,    layer.side, layer.stride, layer.padding, {}, layer.taps,
                       layer.shift,      layer.activation, to};
    for_rows(begin, end, [&](int64_t y, int64_t left, int64_t right, int64_t done) {
      for (int dy = 0; dy < layer.side; ++dy) call.rows[dy] = hidden.inside(y * layer.stride - layer.padding + dy);
      call.out = to + done * mixed_.channels;
      depthwise::chosen(kIndex<T>)(call, left, right);
    });
  }

  void convolve(const Rows<const T>& hidden, int64_t begin, int64_t end, T* to, T* patches) const {
    const Layer<T>& layer = *unit_.mixing;
    if (layer.kind == Kind::direct)
      return for_rows(begin, end, [&](int64_t y, int64_t left, int64_t right, int64_t done) {
        convolve_directly(hidden, y, left, right, to + done * layer.out, patches);
      });
    for_rows(begin, end, [&](int64_t y, int64_t left, int64_t right, int64_t done) {
      copy_patches(layer, hidden, y, left, right, patches + done * layer.depth());
    });
    gemm::Call<T> call = layer.gemm;
    call.a = patches, call.out = to;
    if (residual_ && !unit_.contracting) call.residual = residual_ + begin * result_.channels;
    gemm::multiply(call, 0, end - begin);
  }

  // Pixels `left` to `right` of a row: from where they lie, but those of which a tap lies outside of the map.
  void convolve_directly(const Rows<const T>& hidden, int64_t y, int64_t left, int64_t right, T* to, T* patch) const {
    const Layer<T>& layer = *unit_.mixing;
    const int64_t line = layer.side * layer.in, top = y * layer.stride - layer.padding, width = hidden_.width;
    DirectCall call{layer.side, line,        layer.stride * layer.in, {}, layer.out,
                    layer.taps, layer.shift, layer.activation,        to};
    const auto pixel = [&](int64_t x) {
      copy_patches(layer, hidden, y, x, x + 1, patch);
      for (int dy = 0; dy < layer.side; ++dy) call.rows[dy] = patch + dy * line;
      call.out = to + (x - left) * layer.out;
      direct::chosen(kIndex<T>)(call, 0, 1);
    };
    const bool inside = top >= 0 && top + layer.side <= hidden_.height;
    int64_t first = std::min(right, std::max(left, ceil_div(int64_t(layer.padding), int64_t(layer.stride))));
    int64_t last = inside ? std::min(right, (width + layer.padding - layer.side) / layer.stride + 1) : first;
    if (last <= first) first = last = right;
    for (int64_t x = left; x < first; ++x) pixel(x);
    if (first < last) {
      for (int dy = 0; dy < layer.side; ++dy)
        call.rows[dy] = hidden.of(top + dy) + (first * layer.stride - layer.padding) * layer.in;
      call.out = to + (first - left) * layer.out;
      direct::chosen(kIndex<T>)(call, 0, last - first);
    }
    for (int64_t x = last; x < right; ++x) pixel(x);
  }

  // Calls body(row, left, right, pixels before) for the parts of rows that pixels `begin` to `end` are.
  template <class Body>
  void for_rows(int64_t begin, int64_t end, const Body& body) const {
    const int64_t width = mixed_.width;
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t y = pixel / width, until = std::min(end, (y + 1) * width);
      body(y, pixel - y * width, until - y * width, pixel - begin);
      pixel = until;
    }
  }

  // Rows of the result at a time, and the hidden rows that these need.
  int64_t step_rows() const {
    const Layer<T>& layer = *unit_.mixing;
    const int64_t fit = fitting<T>(kHiddenBytes, hidden_.width * hidden_.channels) - layer.side + layer.stride;
    const int64_t rows = std::min(fit / layer.stride, tile_pixels() / mixed_.width);
    return std::max({int64_t(1), rows, ceil_div(kLeastPixels, mixed_.width)});
  }
  int64_t kept_rows(int64_t rows) const {
    return rows * unit_.mixing->stride + std::max(0, unit_.mixing->side - unit_.mixing->stride);
  }
  int64_t bytes(int64_t hidden_rows) const {
    return hidden_rows * hidden_.width * hidden_.channels * int64_t(sizeof(T));
  }
  // Elements of a tile for each pixel: hidden channels, or results of the convolution and patches.
  int64_t tile_channels() const {
    if (!unit_.mixing) return hidden_.channels;
    const Layer<T>& layer = *unit_.mixing;
    return (unit_.contracting ? mixed_.channels : 0) + (layer.depthwise() ? 0 : layer.depth());
  }
  int64_t tile_pixels() const {
    const int64_t fit = fitting<T>(unit_.mixing ? kTileBytes : kPairBytes, std::max(tile_channels(), mixed_.channels));
    return std::max(kLeastPixels, fit);
  }
  static T* scratch(int64_t elements) { return static_cast<T*>(gemm::task_workspace(elements * int64_t(sizeof(T)))); }

  const Unit<T>& unit_;
  Map in_, hidden_, mixed_, result_;
  const T *x_, *residual_;
  T* out_;
};

}  // namespace

template <class T, class Run>
acc_t<T>* sum_pixels(const Map& map, const T* x, T* memory, const Run& run) {
  using Acc = acc_t<T>;
  const int64_t channels = map.channels, row = map.width * channels;
  Acc *sums = reinterpret_cast<Acc*>(memory), *total = sums + map.height * channels;
  run(map.height, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y)
      chosen(kIndex<T>).sum({channels, x + y * row, sums + y * channels}, 0, map.width);
  });
  chosen(kIndex<Acc>).sum({channels, sums, total}, 0, map.height);
  return total;
}

template <class T, class Run>
void from_planes(const T* planes, const Map& map, T* pixels, const Run& run) {
  if (map.channels < 4)  // a picture's
    return run(map.pixels(), [&](int64_t begin, int64_t end) {
      for (int64_t c = 0; c < map.channels; ++c)
        for (int64_t i = begin; i < end; ++i) pixels[i * map.channels + c] = planes[c * map.pixels() + i];
    });
  run(ceil_div(map.pixels(), kPlanePixels), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPlanePixels, count = std::min(map.pixels(), end * kPlanePixels) - first;
    gemm::transpose(planes + first, map.pixels(), map.channels, count, pixels + first * map.channels, map.channels);
  });
}

template <class T, class Run>
void to_planes(const T* pixels, const Map& map, T* planes, const Run& run) {
  run(ceil_div(map.pixels(), kPlanePixels), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPlanePixels, count = std::min(map.pixels(), end * kPlanePixels) - first;
    gemm::transpose(pixels + first * map.channels, map.channels, count, map.channels, planes + first, map.pixels());
  });
}

template <class T>
Layer<T>::Layer(const gemm::Call<T>& call)
    : kind(Kind::gemm),
      in(call.depth),
      out(call.columns),
      side(1),
      stride(1),
      padding(0),
      activation(call.activation),
      gemm(call) {}

template <class T>
Layer<T>::Layer(int64_t channels, int side, Activation activation, const acc_t<T>* taps, const acc_t<T>* shift)
    : kind(Kind::depthwise),
      in(channels),
      out(channels),
      side(side),
      stride(1),
      padding(side / 2),
      activation(activation),
      taps(taps),
      shift(shift) {}

template <class T>
template <class Run>
void Unit<T>::infer(const Map& in, const T* x, const T* residual, T* memory, T* out, const Run& run) const {
  const int64_t threads = std::is_same_v<Run, gemm::Alone> ? 1 : torch::stable::get_num_threads();
  UnitRun<T>(*this, in, x, residual, out)(memory, threads, run);
}

template <class T>
Layer<T>::Layer(Numbers& numbers, gemm::Packer<T>& packer)
    : kind(Kind(numbers.next())),
      in(numbers.next()),
      out(numbers.next()),
      side(int(numbers.next())),
      stride(int(numbers.next())),
      padding(int(numbers.next())),
      activation(gemm::activation_of(numbers.next())) {
  STD_TORCH_CHECK(kind == Kind::gemm || (side <= kLargestSide && (in == out || kind == Kind::direct)),
                  "sizes: no convolution of kind ", int(kind), " and side ", side);
  if (kind != Kind::gemm) {
    taps = packer.vector("taps", side * side * in * (depthwise() ? 1 : out));
    shift = packer.vector("shift", out);
    return;
  }
  gemm = packer.weight("weight", out, depth());
  gemm.scale = packer.vector("scale", out, 1);
  gemm.shift = packer.vector("shift", out);
  gemm.activation = activation;
}

template <class T>
Unit<T>::Unit(Numbers& numbers, gemm::Packer<T>& packer) {
  const int64_t layers = numbers.next();
  after = gemm::activation_of(numbers.next());
  if (layers & 1) expanding.emplace(numbers, packer);
  if (layers & 2) mixing.emplace(numbers, packer);
  if (layers & 4) contracting.emplace(numbers, packer);
  if (layers & 8) gate.emplace(numbers, packer);
}

#define CEIT_INSTANTIATE_RUN(T, Run)                                   \
  template acc_t<T>* sum_pixels(const Map&, const T*, T*, const Run&); \
  template void from_planes(const T*, const Map&, T*, const Run&);     \
  template void to_planes(const T*, const Map&, T*, const Run&);       \
  template void Unit<T>::infer(const Map&, const T*, const T*, T*, T*, const Run&) const;
#define CEIT_INSTANTIATE(T)            \
  template struct Layer<T>;            \
  template struct Unit<T>;             \
  CEIT_INSTANTIATE_RUN(T, gemm::Alone) \
  CEIT_INSTANTIATE_RUN(T, gemm::Threads)
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)

}  // namespace ceit::convnet
