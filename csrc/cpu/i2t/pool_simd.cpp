// Max-pooling of a channels-last map.
#include "../vector.h"
#include "calls.h"

namespace ceit::i2t_cpu {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

namespace {

template <class T>
void pool(const PoolCall& call, int64_t begin, int64_t end) {
  using Real = RealOf<T>;
  constexpr int lanes = Lanes<Real>::count;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / call.pooled_height, y = task % call.pooled_height;
    const T* in = static_cast<const T*>(call.in) + image * call.height * call.width * call.channels;
    T* out = static_cast<T*>(call.out) + task * call.pooled_width * call.channels;
    const int64_t top = y > 0 ? 2 * y - 1 : 0, bottom = 2 * y + 1 < call.height ? 2 * y + 1 : call.height - 1;
    for (int64_t x = 0; x < call.pooled_width; ++x) {
      const int64_t left = x > 0 ? 2 * x - 1 : 0, right = 2 * x + 1 < call.width ? 2 * x + 1 : call.width - 1;
      for (int64_t c = 0; c < call.channels; c += lanes) {
        const int count = int(call.channels - c < lanes ? call.channels - c : lanes);
        auto largest = splat(-Real(INFINITY));
        for (int64_t row = top; row <= bottom; ++row) {
          for (int64_t column = left; column <= right; ++column) {
            const auto value = load(in + (row * call.width + column) * call.channels + c, count);
            largest = (value > largest) | (value != value) ? value : largest;  // what is no number stays
          }
        }
        store(out + x * call.channels + c, largest, count);
      }
    }
  }
}

}  // namespace

extern const Kernels kernels[3];
const Kernels kernels[3] = {{pool<float>}, {pool<Bf16>}, {pool<double>}};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::i2t_cpu
