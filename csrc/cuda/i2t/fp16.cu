#include "launchers.h"

namespace ceit::i2t {

template void compute<HalfMma<Fp16>, Fp16>(const ForwardCall&);
template void compute<HalfMma<Fp16>, float>(const ForwardCall&);
template void compute<HalfMma<Fp16>, Fp16>(const BackwardCall&);
template void compute<HalfMma<Fp16>, float>(const BackwardCall&);

}  // namespace ceit::i2t
