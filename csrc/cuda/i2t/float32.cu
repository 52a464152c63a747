#include "launchers.h"

namespace ceit::i2t {

template void forward<Tf32Products, float>(const ForwardCall&);
template void forward<ScalarProducts<float>, float>(const ForwardCall&);
template void backward<Tf32Products, float>(const BackwardCall&);
template void backward<ScalarProducts<float>, float>(const BackwardCall&);

}  // namespace ceit::i2t
