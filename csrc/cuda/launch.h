// Launching a kernel on a stream, or on the host.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "device.h"

namespace ceit {

struct Grid {
  int64_t x = 1, y = 1;
};

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* name) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("ceit_kernels: launching ") + name + " failed: " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, void* stream,
            Arguments... arguments) {
  if (shared_bytes > (48 << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

#else

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, void*,
            Arguments... arguments) {
  simt::launch({unsigned(grid.x), unsigned(grid.y), 1}, {unsigned(threads), 1, 1}, shared_bytes,
               [=] { kernel(arguments...); });
}

#endif

}  // namespace ceit
