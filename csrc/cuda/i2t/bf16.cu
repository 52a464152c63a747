#include "launchers.h"

namespace ceit::i2t {

template void forward<HalfMma<Bf16>, Bf16>(const ForwardCall&);
template void forward<HalfMma<Bf16>, float>(const ForwardCall&);
template void backward<HalfMma<Bf16>, Bf16>(const BackwardCall&);
template void backward<HalfMma<Bf16>, float>(const BackwardCall&);

}  // namespace ceit::i2t
