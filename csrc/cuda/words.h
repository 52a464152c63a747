// Numbers as kernels hold them, and registers of matrix instructions. Included by gpu.h.
#pragma once

#include <cstring>

#include "../types.h"

namespace ceit {

struct Fp16 {
  uint16_t bits;
};
// A float that tensor cores read as TF32.
struct Tf32 {
  float value;
};

template <int N>
struct alignas(N < 4 ? N * 4 : 16) Words {
  uint32_t word[N];
};

template <class To, class From>
BOTH To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct Grid {
  int64_t x = 1, y = 1;
};

}  // namespace ceit
