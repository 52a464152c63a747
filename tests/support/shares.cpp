// Takes the place of PyTorch's parallel_for (by LD_PRELOAD): the ranges that so many threads would get run one after
// another, and what each step takes is counted as the thread with the largest range would take, and as all would with
// equal ranges.
#include <algorithm>
#include <chrono>
#include <cstdint>

namespace {

int64_t threads = 1;
double longest = 0, equal = 0;  // seconds
bool within = false;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

extern "C" int32_t torch_get_num_threads(uint32_t* out) {
  *out = uint32_t(threads);
  return 0;
}

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                      void* context) {
  const int64_t tasks = end - begin;
  if (tasks <= 0) return 0;
  const bool nested = within;
  const int64_t used = nested ? 1 : std::min(threads, (tasks + grain - 1) / std::max<int64_t>(grain, 1));
  const int64_t range = (tasks + used - 1) / used;
  within = true;
  const double start = now();
  for (int64_t at = begin; at < end; at += range) body(at, std::min(end, at + range), context);
  const double seconds = now() - start;
  within = nested;
  if (!nested) longest += seconds * double(range) / double(tasks), equal += seconds / double(threads);
  return 0;
}

// How much more the largest ranges took than equal ones would have, since the last call; then goes on with so many
// threads.
extern "C" double shares(int64_t next) {
  const double ratio = longest / equal;
  longest = equal = 0, threads = next;
  return ratio;
}
