// Places of maxima in their windows: bytes in memory, as wide as the values in registers.
#pragma once

#include "../vector.h"

namespace ceit::i2t_cpu {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

template <class Acc>
using Places = decltype(Vec<Acc>{} > Vec<Acc>{});

template <class Acc>
struct PlaceBytes {
  typedef uint8_t Vector __attribute__((vector_size(Lanes<Acc>::count)));
};

// A conversion by more than a factor of two at a time would be compiled lane by lane.
template <class Acc>
CEIT_INLINE void store_places(uint8_t* to, Places<Acc> places, int n) {
  const auto words = __builtin_convertvector(places, typename Lanes<Acc>::Ints);
  const auto halves = __builtin_convertvector(words, typename Lanes<Acc>::Halves);
  const auto bytes = __builtin_convertvector(halves, typename PlaceBytes<Acc>::Vector);
  std::memcpy(to, &bytes, n < Lanes<Acc>::count ? size_t(n) : sizeof bytes);
}

template <class Acc>
CEIT_INLINE Places<Acc> load_places(const uint8_t* from, int n) {
  typename PlaceBytes<Acc>::Vector bytes = {};
  std::memcpy(&bytes, from, n < Lanes<Acc>::count ? size_t(n) : sizeof bytes);
  const auto halves = __builtin_convertvector(bytes, typename Lanes<Acc>::Halves);
  const auto words = __builtin_convertvector(halves, typename Lanes<Acc>::Ints);
  return __builtin_convertvector(words, Places<Acc>);
}

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::i2t_cpu
