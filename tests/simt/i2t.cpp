// The stem's kernels for the host, unchanged, over simt.h: a library for tests. It registers the operators for CPU
// tensors and also computes in float64.
#include <i2t/bf16.cu>
#include <i2t/float32.cu>
#include <i2t/fp16.cu>
#include <i2t/register.cpp>

namespace ceit::i2t {

template void compute<ScalarMma<double>, double>(const ForwardCall&);
template void compute<ScalarMma<double>, double>(const BackwardCall&);

}  // namespace ceit::i2t

// The order in which threads run, for the launches that follow.
extern "C" void ceit_set_schedule(unsigned seed) { simt::schedule_seed = seed; }
