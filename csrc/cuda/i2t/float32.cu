#include "launchers.h"

namespace ceit::i2t {

template void compute<Tf32Mma, float>(const ForwardCall&);
template void compute<ScalarMma<float>, float>(const ForwardCall&);
template void compute<Tf32Mma, float>(const BackwardCall&);
template void compute<ScalarMma<float>, float>(const BackwardCall&);

}  // namespace ceit::i2t
