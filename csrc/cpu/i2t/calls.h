// What the stem's pooling takes on the CPU, and the table of its implementations.
#pragma once

#include <cstdint>

namespace ceit::i2t_cpu {

// out = the largest of each window of 3 x 3, stride 2, one row and column of padding; channels-last in memory.
struct PoolCall {
  const void* in;  // (B, height, width, channels)
  void* out;       // (B, pooled_height, pooled_width, channels)
  int64_t height, width, channels, pooled_height, pooled_width;
};

// Each runs a range of tasks, rows of the results of all images.
struct Kernels {
  void (*pool)(const PoolCall&, int64_t begin, int64_t end);
};

}  // namespace ceit::i2t_cpu
