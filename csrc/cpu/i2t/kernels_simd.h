// The kernels of one capability, for its table.
#pragma once

#include "../vector.h"
#include "calls.h"

namespace ceit::i2t_cpu {
namespace CEIT_CAPABILITY {

using namespace ceit::CEIT_CAPABILITY;

template <class T>
void forward(const ForwardCall& call, int64_t begin, int64_t end);
template <class T>
void normalise(const NormaliseCall& call, int64_t begin, int64_t end);
template <class T>
void sums(const SumsCall& call, int64_t begin, int64_t end);
template <class T>
void backward(const BackwardCall& call, int64_t begin, int64_t end);

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::i2t_cpu
