#include "launchers.h"

namespace ceit::i2t {

template void forward<HalfMma<Fp16>, Fp16>(const ForwardCall&);
template void forward<HalfMma<Fp16>, float>(const ForwardCall&);
template void backward<HalfMma<Fp16>, Fp16>(const BackwardCall&);
template void backward<HalfMma<Fp16>, float>(const BackwardCall&);

}  // namespace ceit::i2t
