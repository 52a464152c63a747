// Runs CUDA device code on the host, to test kernels where there is no GPU.
//
// Every thread of a block is a fiber; fibers switch where threads meet (barriers, warp collectives) and nowhere else,
// in an order and at a pace drawn from a seed. Shared memory starts out as NaN. A thread that waits for one that never
// comes is reported. One operating-system thread runs everything, block after block.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_SANITIZED 1
#else
#define SIMT_SANITIZED 0
#endif

namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  size_t count() const { return size_t(x) * y * z; }
};

inline unsigned schedule_seed = 0;

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;

// What the lanes of a warp hand in and take out at a collective.
struct Warp {
  alignas(16) unsigned char in[kWarp][64], out[kWarp][64];
  uint32_t arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
  Dim thread;
  unsigned index = 0;
};

struct Block {
  Dim grid, size, index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  std::function<void()> body;
  ucontext_t scheduler;
  jmp_buf scheduler_resume;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  unsigned live = 0, at_barrier = 0, barrier_generation = 0;
  uint64_t progress = 0;
};

inline Block* block = nullptr;
inline Fiber* fiber = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s, in block %u, %u, %u\n", what, block->index.x, block->index.y, block->index.z);
  std::abort();
}

// Leave the current fiber for the scheduler. Jumps are ten times as fast as swapcontext, which asks the kernel for the
// signal mask, but an address sanitizer has to be told about the stacks.
inline void suspend() {
#if SIMT_SANITIZED
  __sanitizer_start_switch_fiber(fiber->done ? nullptr : &fiber->fake_stack, block->scheduler_stack,
                                 block->scheduler_stack_bytes);
  swapcontext(&fiber->start, &block->scheduler);
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &block->scheduler_stack, &block->scheduler_stack_bytes);
#else
  if (_setjmp(fiber->resume) == 0) _longjmp(block->scheduler_resume, 1);
#endif
}

inline void fiber_main() {
#if SIMT_SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  block->body();
  fiber->done = true;
  block->live--;
  block->progress++;
  suspend();
}

inline void resume(Fiber& next) {
  fiber = &next;
#if SIMT_SANITIZED
  __sanitizer_start_switch_fiber(&block->scheduler_fake_stack, next.stack, kStackBytes);
  swapcontext(&block->scheduler, &next.start);
  __sanitizer_finish_switch_fiber(block->scheduler_fake_stack, nullptr, nullptr);
#else
  if (_setjmp(block->scheduler_resume) == 0) {
    if (next.started) _longjmp(next.resume, 1);
    next.started = true;
    setcontext(&next.start);
  }
#endif
}

inline void barrier() {
  const unsigned generation = block->barrier_generation;
  block->progress++;
  if (++block->at_barrier == block->fibers.size()) {
    block->at_barrier = 0;
    block->barrier_generation++;
  } else {
    while (block->barrier_generation == generation) suspend();
  }
}

// All 32 lanes hand in a value; the last to arrive computes what each takes out.
template <class Out, class In, class Compute>
Out collective(const In& value, Compute compute) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  Warp& warp = block->warps[fiber->index / kWarp];
  const unsigned lane = fiber->index % kWarp, generation = warp.generation;
  std::memcpy(warp.in[lane], &value, sizeof(In));
  warp.arrived |= 1u << lane;
  block->progress++;
  if (warp.arrived == 0xffffffffu) {
    In in[kWarp];
    Out out[kWarp];
    for (int i = 0; i < kWarp; ++i) std::memcpy(&in[i], warp.in[i], sizeof(In));
    compute(in, out);
    for (int i = 0; i < kWarp; ++i) std::memcpy(warp.out[i], &out[i], sizeof(Out));
    warp.arrived = 0;
    warp.generation++;
  } else {
    while (warp.generation == generation) suspend();
  }
  Out result;
  std::memcpy(&result, warp.out[lane], sizeof(Out));
  return result;
}

inline void run_block(std::mt19937& random, unsigned char* stacks) {
  block->live = unsigned(block->fibers.size());
  for (unsigned i = 0; i < block->live; ++i) {
    Fiber& f = block->fibers[i];
    f = Fiber();
    f.index = i;
    f.thread = {i % block->size.x, i / block->size.x % block->size.y, i / (block->size.x * block->size.y)};
    f.stack = stacks + size_t(i) * kStackBytes;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack;
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, fiber_main, 0);
  }
  std::vector<unsigned> order(block->live);
  std::iota(order.begin(), order.end(), 0u);
  // Warps of different pace: one may be far ahead of another wherever no barrier holds it back.
  std::vector<unsigned> pace(block->warps.size(), 1);
  if (schedule_seed)
    for (unsigned& p : pace) p = 1 + random() % 16;
  std::vector<char> runs(pace.size());
  for (bool everyone = false; block->live;) {
    std::shuffle(order.begin(), order.end(), random);
    for (size_t w = 0; w < pace.size(); ++w) runs[w] = everyone || random() % pace[w] == 0;
    const uint64_t before = block->progress;
    for (unsigned i : order)
      if (runs[i / kWarp] && !block->fibers[i].done) resume(block->fibers[i]);
    const bool stuck = block->progress == before;
    if (stuck && everyone) fail("threads wait for others that never come");
    everyone = stuck;
  }
}

// Runs `body` for every thread of every block of a grid.
inline void launch(Dim grid, Dim size, size_t shared_bytes, std::function<void()> body) {
  Block current;
  block = &current;
  current.grid = grid;
  current.size = size;
  current.body = std::move(body);
  current.fibers.resize(size.count());
  current.warps.resize((size.count() + kWarp - 1) / kWarp);
  const size_t stack_bytes = kStackBytes * size.count();
  void* stacks = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the stacks");
  std::mt19937 random(schedule_seed);
  std::vector<size_t> blocks(grid.count());
  std::iota(blocks.begin(), blocks.end(), size_t(0));
  if (schedule_seed) std::shuffle(blocks.begin(), blocks.end(), random);
  for (size_t i : blocks) {
    current.index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (size_t(grid.x) * grid.y))};
    current.shared.reset(new unsigned char[shared_bytes + 1]);
    std::memset(current.shared.get(), 0xff, shared_bytes);
    run_block(random, static_cast<unsigned char*>(stacks));
  }
  munmap(stacks, stack_bytes);
  block = nullptr;
}

}  // namespace simt
