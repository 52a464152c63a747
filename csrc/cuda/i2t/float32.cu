#include "launchers.h"

namespace ceit::i2t {

template void forward<Tf32Mma, float>(const ForwardCall&);
template void forward<ScalarMma<float>, float>(const ForwardCall&);
template void backward<Tf32Mma, float>(const BackwardCall&);
template void backward<ScalarMma<float>, float>(const BackwardCall&);

}  // namespace ceit::i2t
