// Memory that a range of tasks works in.
#pragma once

#include <new>

#include "vector.h"

namespace ceit {
namespace CEIT_CAPABILITY {

// `count` zeros, aligned to a line of cache.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kAlignment))) {
    std::memset(static_cast<void*>(data_), 0, size_t(count) * sizeof(T));
  }
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace CEIT_CAPABILITY
}  // namespace ceit
