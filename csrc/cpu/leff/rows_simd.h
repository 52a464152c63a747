#pragma once

#include "calls.h"

namespace ceit::leff {
namespace CEIT_CAPABILITY {

// For T float, Bf16 and double; `finish` also for a T of 16 bits and a result of float.
template <class T>
void moments(const MomentsCall& call, int64_t begin, int64_t end);
template <class T>
void activate_rows(const ActivateCall& call, int64_t begin, int64_t end);
template <class T>
void activate_backward(const ActivateBackwardCall& call, int64_t begin, int64_t end);
template <class T>
void sums(const SumsCall& call, int64_t begin, int64_t end);
template <class T>
void gradient(const GradientCall& call, int64_t begin, int64_t end);
template <class T, class Out>
void finish(const FinishCall& call, int64_t begin, int64_t end);
template <class T>
void transpose(const TransposeCall& call, int64_t begin, int64_t end);

}  // namespace CEIT_CAPABILITY
}  // namespace ceit::leff
