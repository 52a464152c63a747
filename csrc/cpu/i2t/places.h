// Places of maxima in their windows: bytes in memory, as wide as the values in registers.
#pragma once

#include "../vector.h"

namespace ceit::i2t_cpu {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

template <class Real>
using Places = decltype(Vec<Real>{} > Vec<Real>{});

template <class Real>
struct PlaceBytes {
  typedef uint8_t Vector __attribute__((vector_size(Lanes<Real>::count)));
};

// A conversion by more than a factor of two at a time would be compiled lane by lane.
template <class Real>
CEIT_INLINE void store_places(uint8_t* to, Places<Real> places, int n) {
  const auto words = __builtin_convertvector(places, typename Lanes<Real>::Ints);
  const auto halves = __builtin_convertvector(words, typename Lanes<Real>::Halves);
  const auto bytes = __builtin_convertvector(halves, typename PlaceBytes<Real>::Vector);
  std::memcpy(to, &bytes, n < Lanes<Real>::count ? size_t(n) : sizeof bytes);
}

template <class Real>
CEIT_INLINE Places<Real> load_places(const uint8_t* from, int n) {
  typename PlaceBytes<Real>::Vector bytes = {};
  std::memcpy(&bytes, from, n < Lanes<Real>::count ? size_t(n) : sizeof bytes);
  const auto halves = __builtin_convertvector(bytes, typename Lanes<Real>::Halves);
  const auto words = __builtin_convertvector(halves, typename Lanes<Real>::Ints);
  return __builtin_convertvector(words, Places<Real>);
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::i2t_cpu
