// Runs the stem's kernels on a small image under several schedules, by themselves: for sanitizers, and to see that a
// barrier that is missing from the kernels is noticed. The argument is the number of schedules. Exits with 1 if two
// schedules differ or a result is not finite.
#include <cstdio>
#include <i2t/bf16.cu>
#include <i2t/float32.cu>

using namespace ceit;
using namespace ceit::i2t;

namespace {

constexpr int kOut = 32;
unsigned schedules = 6;

template <class T>
std::vector<T> random_values(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) value = convert<T>(normal(random));
  return values;
}

template <class T>
uint64_t bits_of(const std::vector<T>& values, bool& finite) {
  uint64_t hash = 14695981039346656037ull;
  for (const T& value : values) {
    const float number = float(to_float(value));
    finite = finite && number - number == 0;
    hash = (hash ^ bit_cast<uint32_t>(number)) * 1099511628211ull;
  }
  return hash;
}

// The image ends with its buffer, so that a read beyond it is seen.
template <class Mma>
bool run(const char* name, int height, int width) {
  using Element = typename Mma::Element;
  using Output = typename Mma::Output;
  std::mt19937 random(1);
  Problem s{2, 3, height, width, int64_t(3) * height * width, int64_t(height) * width, width, 1};
  s.conv_height = (height - 1) / 2 + 1, s.conv_width = (width - 1) / 2 + 1;
  s.pooled_height = (s.conv_height - 1) / 2 + 1, s.pooled_width = (s.conv_width - 1) / 2 + 1;
  s.out_channels = kOut;
  const size_t pooled = size_t(s.batch) * s.pooled_height * s.pooled_width * kOut;
  const std::vector<float> image = random_values<float>(size_t(6) * height * width, random);
  const std::vector<float> weight = random_values<float>(kOut * 147, random),
                           gamma = random_values<float>(kOut, random);
  const std::vector<Output> gradient = random_values<Output>(pooled, random);
  constexpr int kRows = 8, kBlocks = 3;  // the image comes in two parts a block
  bool good = true;
  uint64_t expected[5] = {};
  for (unsigned seed = 0; seed < schedules; ++seed) {
    simt::schedule_seed = seed;
    std::vector<float> mean(kOut), variance(kOut), moments(moments_elements(s, kRows)), sums(sums_elements(s, kBlocks));
    std::vector<float> grad_weight(kOut * 147), grad_gamma(kOut), grad_beta(kOut), grad_image(image.size());
    std::vector<Element> packed(kOut * kPackedPerChannel);
    std::vector<Output> out(pooled);
    std::vector<uint8_t> indices(pooled);
    ForwardCall f{};
    f.problem = s, f.image = image.data(), f.weight = weight.data(), f.gamma = gamma.data(), f.beta = gamma.data();
    f.mean = mean.data(), f.variance = variance.data(), f.packed = packed.data(), f.eps = 1e-5, f.training = true;
    f.moments = moments.data(), f.out = out.data(), f.indices = indices.data(), f.rows_per_block = kRows;
    compute<Mma, float>(f);
    BackwardCall b{};
    static_cast<Call&>(b) = f;
    b.gradient = gradient.data(), b.indices = indices.data(), b.sums = sums.data(), b.blocks = kBlocks;
    b.grad_weight = grad_weight.data(), b.grad_gamma = grad_gamma.data(), b.grad_beta = grad_beta.data();
    b.grad_image = grad_image.data();
    compute<Mma, float>(b);
    const uint64_t bits[5] = {bits_of(out, good), bits_of(grad_weight, good), bits_of(grad_gamma, good),
                              bits_of(mean, good), bits_of(grad_image, good)};
    for (int i = 0; i < 5; ++i) {
      if (seed == 0) expected[i] = bits[i];
      good = good && bits[i] == expected[i];
    }
  }
  std::printf("%s %d x %d: %s\n", name, height, width, good ? "the same finite bits" : "WRONG");
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) schedules = unsigned(std::atoi(arguments[1]));
  bool good = true;
  // The first has rows that are loaded by 16 bytes.
  for (const auto& size : {std::pair{19, 40}, std::pair{19, 33}, std::pair{9, 7}}) {
    good &= run<HalfMma<Bf16>>("bfloat16", size.first, size.second);
    good &= run<Tf32Mma>("tf32", size.first, size.second);
    good &= run<ScalarMma<float>>("float32", size.first, size.second);
  }
  return good ? 0 : 1;
}
