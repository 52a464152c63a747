#include "net.h"

namespace ceit::convnet {
namespace {

template <class T>
auto kind_of(Numbers& numbers, gemm::Packer<T>& packer, int64_t kind) -> decltype(Step<T>::what) {
  if (kind == 0) return Layers<T>(numbers, packer);
  if (kind == 1) return Norm<T>(numbers, packer);
  if (kind == 2) return Attention<T>(numbers, packer);
  if (kind == 3) return Upsample<T>(numbers, packer);
  STD_TORCH_CHECK(kind == 4, "sizes: no step of kind ", kind);
  return Pool<T>(numbers, packer);
}

}  // namespace

template <class T>
Net<T>::Net(const std::vector<int64_t>& sizes, gemm::Packer<T>& packer) {
  Numbers numbers(sizes);
  slots_ = size_t(numbers.next());
  const auto slot = [&](int64_t least) {
    const int64_t index = numbers.next();
    STD_TORCH_CHECK(index >= least && index < int64_t(slots_), "sizes: no slot ", index);
    return index;
  };
  while (!numbers.end()) {
    const int64_t kind = numbers.next(), to = slot(1), added = slot(-1);
    const std::array<int64_t, 3> from{slot(0), slot(-1), slot(-1)};
    steps_.push_back({to, added, from, kind_of(numbers, packer, kind)});
  }
}

template <class T>
Maps Net<T>::read(const std::vector<Map>& maps, const Step<T>& step) const {
  Maps in{};
  for (size_t i = 0; i < in.size(); ++i)
    if (step.from[i] >= 0) in[i] = maps[size_t(step.from[i])];
  return in;
}

template <class T>
auto Net<T>::plan(const Map& in) const -> Plan {
  Plan plan{std::vector<Map>(slots_), {}, 0};
  std::vector<int64_t> sizes(slots_);
  int64_t memory = 0;
  plan.maps[0] = in, sizes[0] = in.elements();
  for (const Step<T>& step : steps_) {
    const Maps maps = read(plan.maps, step);
    const size_t to = size_t(step.to);
    std::visit([&](const auto& what) { plan.maps[to] = what.map(maps), memory = std::max(memory, what.memory(maps)); },
               step.what);
    sizes[to] = std::max(sizes[to], plan.maps[to].elements());
  }
  for (const int64_t size : sizes) {  // in whole lines of the cache
    plan.starts.push_back(plan.elements);
    plan.elements += ceil_div(size, 32) * 32;
  }
  plan.starts.push_back(plan.elements);
  plan.elements += memory;
  return plan;
}

template <class T>
template <class Run>
void Net<T>::infer(const Map& in, bool planar, const T* x, T* memory, T* out, const Run& run) const {
  const Plan plan = this->plan(in);
  std::vector<Map> maps(slots_);
  std::vector<T*> slots;
  for (const int64_t start : plan.starts) slots.push_back(memory + start);
  maps[0] = in;
  const T* first = planar ? slots[0] : x;
  const bool to_turn = planar && plan.maps[1].pixels() > 1;
  if (planar) from_planes(x, in, slots[0], run);
  if (!to_turn) slots[1] = out;
  for (const Step<T>& step : steps_) {
    const auto at = [&](int64_t slot) -> const T* {
      return slot < 0 ? nullptr : slot == 0 ? first : slots[size_t(slot)];
    };
    const Inputs<T> inputs{{at(step.from[0]), at(step.from[1]), at(step.from[2])}, at(step.added)};
    const Maps read = this->read(maps, step);
    const size_t to = size_t(step.to);
    std::visit(
        [&](const auto& what) {
          maps[to] = what.map(read);
          what.infer(read, inputs, slots.back(), slots[to], run);
        },
        step.what);
  }
  if (to_turn) to_planes<T>(slots[1], maps[1], out, run);
}

#define CEIT_INSTANTIATE(T)                                                                  \
  template class Net<T>;                                                                     \
  template void Net<T>::infer(const Map&, bool, const T*, T*, T*, const gemm::Alone&) const; \
  template void Net<T>::infer(const Map&, bool, const T*, T*, T*, const gemm::Threads&) const;
CEIT_INSTANTIATE(float)
CEIT_INSTANTIATE(Bf16)
CEIT_INSTANTIATE(double)

}  // namespace ceit::convnet
