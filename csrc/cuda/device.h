// The types and instructions of device code; what is the GPU's own is in gpu.h, which the include path chooses.
#pragma once

#include <gpu.h>

#include <cmath>
#include <type_traits>

namespace ceit {

BOTH float to_float(float x) { return x; }
BOTH double to_float(double x) { return x; }
BOTH void from_float(float x, float& y) { y = x; }
BOTH void from_float(double x, double& y) { y = x; }
BOTH float to_float(Tf32 x) { return x.value; }

template <class To, class From>
DEVICE To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else {
    To y;
    from_float(to_float(x), y);
    return y;
  }
}

}  // namespace ceit
