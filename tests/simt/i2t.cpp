// The stem's kernels for the host, unchanged, over simt.h: a library for tests. It registers the operators for CPU
// tensors and also computes in float64.
#define CEIT_ON_HOST 1
#include "../cuda/i2t/bf16.cu"
#include "../cuda/i2t/float32.cu"
#include "../cuda/i2t/fp16.cu"
#include "../cuda/i2t/register.cpp"

namespace ceit::i2t {

template void forward<ScalarProducts<double>, double>(const ForwardCall&);
template void backward<ScalarProducts<double>, double>(const BackwardCall&);

}  // namespace ceit::i2t

// The order in which threads run, for the launches that follow.
extern "C" void ceit_set_schedule(unsigned seed) { simt::schedule_seed = seed; }
