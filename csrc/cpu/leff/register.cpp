// Registration of LeFF's code for the CPU with PyTorch's dispatcher, through libtorch's stable ABI. The schemas are in
// ceit_kernels/leff/native/stages.py.
#include "stages.h"

STABLE_TORCH_LIBRARY_IMPL(ceit, CPU, m) {
  m.impl("_leff_depthwise", TORCH_BOX(&ceit::leff::depthwise));
  m.impl("_leff_depthwise_backward", TORCH_BOX(&ceit::leff::depthwise_backward));
  m.impl("_leff_sums", TORCH_BOX(&ceit::leff::sums));
  m.impl("_leff_gradient", TORCH_BOX(&ceit::leff::gradient));
  m.impl("_leff_finish", TORCH_BOX(&ceit::leff::finish));
  m.impl("_leff_norm_array", TORCH_BOX(&ceit::leff::norm_array));
  m.impl("_leff_gradient_array", TORCH_BOX(&ceit::leff::gradient_array));
  m.impl("_leff_infer", TORCH_BOX(&ceit::leff::infer));
  m.impl("_leff_expand", TORCH_BOX(&ceit::leff::expand));
  m.impl("_leff_contract", TORCH_BOX(&ceit::leff::contract));
  m.impl("_leff_contract_backward", TORCH_BOX(&ceit::leff::contract_backward));
  m.impl("_leff_expand_backward", TORCH_BOX(&ceit::leff::expand_backward));
  m.impl("_transpose", TORCH_BOX(&ceit::leff::transpose));
}

// Packed weights have a layout of oneDNN's.
STABLE_TORCH_LIBRARY_IMPL(ceit, MkldnnCPU, m) { m.impl("_leff_infer", TORCH_BOX(&ceit::leff::infer)); }
