// Registration of LeFF's code for the CPU with PyTorch's dispatcher, through libtorch's stable ABI. The schemas are in
// ceit_kernels/leff/native/stages.py.
#include "training.h"

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_leff_infer", TORCH_BOX(&ceit::leff::infer));
  m.impl("_leff_pack", TORCH_BOX(&ceit::leff::pack));
  m.impl("_leff_train", TORCH_BOX(&ceit::leff::train));
  m.impl("_leff_train_backward", TORCH_BOX(&ceit::leff::train_backward));
  m.impl("_transpose", TORCH_BOX(&ceit::leff::transpose));
}
