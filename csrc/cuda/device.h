// The types and instructions of device code; what is the GPU's own is in gpu.h, which the include path chooses.
#pragma once

#include <gpu.h>

#include <cmath>

namespace ceit {

BOTH float to_float(float x) { return x; }
BOTH double to_float(double x) { return x; }
BOTH void from_float(float x, float& y) { y = x; }
BOTH void from_float(double x, double& y) { y = x; }
BOTH float to_float(Tf32 x) { return x.value; }

template <class To, class From>
DEVICE To convert(From x) {
  To y;
  from_float(x, y);
  return y;
}

}  // namespace ceit
