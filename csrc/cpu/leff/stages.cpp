// Checks of the stages' arguments, and their threads.
#include "stages.h"

#include "../capability.h"

namespace ceit::leff {

CEIT_DECLARE_TABLE(Kernels, kernels, 3)

namespace {

Type type_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double,
                  "the kernels compute in float32, bfloat16 and float64");
  return type == ScalarType::Float ? Type::float32 : type == ScalarType::BFloat16 ? Type::bfloat16 : Type::float64;
}

const Kernels& kernels_for(const Tensor& tensor) { return chosen(int(type_of(tensor))); }

// A (B, rows, channels) tensor of `like`'s dtype that has a shape's tokens.
Map map(const char* name, const Tensor& tensor, const Shape& shape, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.is_contiguous(), name,
                  ": expected a contiguous tensor (B, rows, channels)");
  STD_TORCH_CHECK(tensor.size(0) == shape.images && tensor.size(1) >= shape.tokens && tensor.size(2) == shape.channels,
                  name, ": expected (", shape.images, ", ", shape.tokens, " or more, ", shape.channels, "), got (",
                  tensor.size(0), ", ", tensor.size(1), ", ", tensor.size(2), ")");
  return {tensor.data_ptr(), tensor.size(1)};
}

Map map(const char* name, const OptionalTensor& tensor, const Shape& shape, ScalarType type) {
  return tensor ? map(name, *tensor, shape, type) : Map{};
}

void* array(const char* name, const OptionalTensor& tensor, int64_t elements, ScalarType type) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == elements, name, ": expected ", elements,
                  " contiguous elements, got ", tensor->numel());
  return tensor->data_ptr();
}

Shape shape_of(const Tensor& tensor, int64_t tokens) {
  STD_TORCH_CHECK(tensor.dim() == 3, "expected a tensor (B, rows, channels)");
  return {tensor.size(0), tokens, tensor.size(2)};
}

int checked_side(int64_t side) {
  STD_TORCH_CHECK(side == 3 || side == 5 || side == 7, "taps: expected a side of 3, 5 or 7, got ", side);
  return int(side);
}

int64_t block_tasks(const Shape& shape) { return shape.images * ((shape.channels + kBlock - 1) / kBlock); }
int64_t row_tasks(const Shape& shape, int64_t rows) { return shape.images * ((rows + kRows - 1) / kRows); }

template <class Call>
void run(Kernel<Call> kernel, const Call& call, int64_t tasks) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace

Activation checked_activation(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index <= int64_t(Activation::identity), "unknown activation ", index);
  return Activation(index);
}

void depthwise(Tensor in, OptionalTensor norm, int64_t first, Tensor taps, OptionalTensor bias, int64_t second,
               int64_t side, int64_t height, int64_t width, Tensor out, OptionalTensor moments) {
  const ScalarType type = in.scalar_type(), real = real_type(in);
  DepthwiseCall call{};
  const Shape shape = call.shape = shape_of(in, height * width);
  call.height = call.bottom = int(height), call.width = int(width), call.side = checked_side(side);
  call.in = map("in", in, shape, type);
  call.norm = array("norm", norm, 5 * shape.channels, real);
  call.first = checked_activation(first), call.second = checked_activation(second);
  call.taps = array("taps", taps, side * side * shape.channels, real);
  call.bias = array("bias", bias, shape.channels, real);
  call.out = map("out", out, shape, type);
  call.moments = array("moments", moments, shape.images * 2 * shape.channels, real);
  run(kernels_for(in).depthwise, call, block_tasks(shape));
}

void depthwise_backward(Tensor g, Tensor z2, OptionalTensor gradient2, Tensor taps, Tensor z1, OptionalTensor norm1,
                        int64_t first, int64_t side, int64_t height, int64_t width, OptionalTensor sums1,
                        OptionalTensor grad_taps) {
  const ScalarType type = g.scalar_type(), real = real_type(g);
  DepthwiseBackwardCall call{};
  const Shape shape = call.shape = shape_of(g, height * width);
  call.height = int(height), call.width = int(width), call.side = checked_side(side);
  call.g = map("g", g, shape, type);
  call.z2 = map("z2", z2, shape, type);
  call.gradient2 = array("gradient2", gradient2, 4 * shape.channels, real);
  call.taps = array("taps", taps, side * side * shape.channels, real);
  call.z1 = map("z1", z1, shape, type);
  call.norm1 = array("norm1", norm1, 5 * shape.channels, real);
  call.first = checked_activation(first);
  call.sums1 = array("sums1", sums1, shape.images * 2 * shape.channels, real);
  call.grad_taps = array("grad_taps", grad_taps, shape.images * side * side * shape.channels, real);
  run(kernels_for(g).depthwise_backward, call, block_tasks(shape));
}

void moments(Tensor in, int64_t tokens, Tensor moments) {
  const Shape shape = shape_of(in, tokens);
  const MomentsCall call{shape, map("in", in, shape, in.scalar_type()),
                         array("moments", moments, shape.images * 2 * shape.channels, real_type(in))};
  run(kernels_for(in).moments, call, block_tasks(shape));
}

void activate(Tensor in, OptionalTensor norm, int64_t kind, int64_t tokens, Tensor out) {
  const Shape shape = shape_of(in, tokens);
  const ActivateCall call{shape, map("in", in, shape, in.scalar_type()),
                          array("norm", norm, 5 * shape.channels, real_type(in)), checked_activation(kind),
                          map("out", out, shape, in.scalar_type())};
  run(kernels_for(in).activate, call, row_tasks(shape, tokens));
}

void activate_backward(Tensor g, Tensor z, OptionalTensor norm, int64_t kind, int64_t tokens, Tensor dz,
                       OptionalTensor out, Tensor sums) {
  const ScalarType type = g.scalar_type(), real = real_type(g);
  const Shape shape = shape_of(g, tokens);
  const ActivateBackwardCall call{shape,
                                  map("g", g, shape, type),
                                  map("z", z, shape, type),
                                  array("norm", norm, 5 * shape.channels, real),
                                  checked_activation(kind),
                                  map("dz", dz, shape, type),
                                  map("out", out, shape, type),
                                  {},
                                  array("sums", sums, shape.images * 2 * shape.channels, real)};
  run(kernels_for(g).activate_backward, call, block_tasks(shape));
}

void sums(Tensor g, OptionalTensor z, OptionalTensor norm, int64_t tokens, Tensor sums) {
  const ScalarType type = g.scalar_type(), real = real_type(g);
  const Shape shape = shape_of(g, tokens);
  const SumsCall call{shape, map("g", g, shape, type), map("z", z, shape, type),
                      array("norm", norm, 5 * shape.channels, real),
                      array("sums", sums, shape.images * 2 * shape.channels, real)};
  run(kernels_for(g).sums, call, block_tasks(shape));
}

void gradient(Tensor g, OptionalTensor z, OptionalTensor gradient, int64_t tokens, Tensor out) {
  const ScalarType type = g.scalar_type();
  const Shape shape = shape_of(g, tokens);
  STD_TORCH_CHECK(z.has_value() || !gradient.has_value(), "z: expected with gradient");
  const GradientCall call{shape,
                          map("g", g, shape, type),
                          map("z", z, shape, type),
                          array("gradient", gradient, 4 * shape.channels, real_type(g)),
                          map("out", out, shape, type),
                          {},
                          0,
                          shape.channels};
  run(kernels_for(g).gradient, call, row_tasks(shape, tokens));
}

void finish(Tensor z, OptionalTensor norm, Tensor x, OptionalTensor residual, int64_t tokens, Tensor out) {
  const ScalarType type = z.scalar_type(), wide = out.scalar_type();
  const Shape shape = shape_of(z, tokens);
  const bool in_float = type == ScalarType::BFloat16 && wide == ScalarType::Float;
  STD_TORCH_CHECK(type == wide || in_float, "out: unexpected dtype");
  const Map result = map("out", out, shape, wide);
  // Without prefix tokens x is not read, whatever its width and dtype.
  const Map tokens_in = result.rows == tokens ? Map{} : map("x", x, shape, wide);
  const FinishCall call{shape,
                        map("z", z, shape, type),
                        array("norm", norm, 5 * shape.channels, real_type(z)),
                        tokens_in,
                        array("residual", residual, out.numel(), wide),
                        result};
  const Kernels& table = kernels_for(z);
  run(in_float ? table.finish_in_float : table.finish, call, row_tasks(shape, result.rows));
}

void transpose(Tensor in, Tensor out) {
  STD_TORCH_CHECK(in.dim() == 2 && in.is_contiguous(), "in: expected a contiguous matrix");
  const TransposeCall call{in.size(0), in.size(1), in.data_ptr(), array("out", out, in.numel(), in.scalar_type()),
                           in.size(0)};
  run(kernels_for(in).transpose, call, (in.size(0) + kRows - 1) / kRows);
}

void transpose_rows(const float* in, int64_t rows, int64_t columns, float* out) {
  const TransposeCall call{rows, columns, in, out, turned_stride(rows)};
  chosen(int(Type::float32)).transpose(call, 0, (rows + kRows - 1) / kRows);
}

}  // namespace ceit::leff
