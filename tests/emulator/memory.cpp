// Which memory there is, and what may be done with it.
//
// Every tensor's memory comes from the allocator below, with room around it that belongs to nobody,
// so that each access of a kernel can be told to be inside one allocation, aligned as a GPU asks,
// and to something that was written before. The last is seen without a record of writes, which
// PyTorch's own operators make too: new memory is filled with numbers that follow from its
// addresses, and eight neighbouring bytes that still hold them are taken for never written.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kAlignment = 512;  // of the memory that torch's CUDA allocator hands out
constexpr size_t kGap = 1024;       // around an allocation
constexpr size_t kMostFilled = size_t{256} << 20;

struct Memory {
  uintptr_t begin = 0;
  size_t bytes = 0;

  bool contains(uintptr_t at) const { return at - begin < bytes; }
  bool contains(uintptr_t at, size_t count) const {
    return contains(at) && count <= bytes - (at - begin);
  }
};

struct Allocation : Memory {
  MemoryOf owner = MemoryOf::kDevice;
  Histories histories;  // once a kernel has accessed it
};

std::mutex mutex;
std::map<uintptr_t, Allocation> allocations;
std::atomic<uint64_t> changes{0};

Memory stacks, threads, parameters;  // a thread's registers, what it knows of itself, its arguments

alignas(kAlignment) char shared_memory[kMaxResident * kSharedBytes];
History shared_history[kMaxResident * kSharedBytes];
struct SharedVariable : Memory {  // begin: from the start of a block's shared memory
  int key = 0;
  Histories histories[kMaxResident];
};
std::vector<SharedVariable> shared_variables;

uint64_t never_written(uintptr_t word) {
  const uint64_t mixed = (word ^ word >> 17) * 0x9e3779b97f4a7c15;
  return mixed ^ mixed >> 29;
}

// `end`: of the memory there. Of a word that ends beyond it too few bytes would count: by chance
// one in 256 single bytes is what it was filled with.
bool is_never_written(uintptr_t at, uintptr_t end) {
  const uintptr_t word = at & ~uintptr_t{7};
  if (word + sizeof(uint64_t) > end) {
    return false;
  }
  uint64_t held;
  std::memcpy(&held, reinterpret_cast<const void*>(word), sizeof(held));
  return held == never_written(word);
}

// Null where there is none.
Allocation* find_allocation(uintptr_t at) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto above = allocations.upper_bound(at);
  return above != allocations.begin() && std::prev(above)->second.contains(at)
             ? &std::prev(above)->second
             : nullptr;
}

// The same for a kernel: only one runs at a time, so that what was found last can be looked at
// first.
Allocation* find_again(uintptr_t at) {
  static Allocation* recent[8] = {};
  static unsigned next = 0;
  static uint64_t seen = 0;
  if (const uint64_t now = changes; seen != now) {
    seen = now;
    std::fill(std::begin(recent), std::end(recent), nullptr);
  }
  for (Allocation* known : recent) {
    if (known != nullptr && known->contains(at)) {
      return known;
    }
  }
  return recent[next++ % std::size(recent)] = find_allocation(at);
}

Histories& histories_of(Allocation& allocation) {
  Histories& all = allocation.histories;
  if (all.of_bytes == nullptr) {  // pages that are not touched cost nothing
    all.bytes = allocation.bytes;
    void* memory = mmap(nullptr, all.bytes * sizeof(History), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    all.of_bytes = static_cast<History*>(memory);
  }
  return all;
}

void unregister_memory(void* begin) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(begin));
  if (const Histories& all = found->second.histories; all.of_bytes != nullptr) {
    munmap(all.of_bytes, all.bytes * sizeof(History));
  }
  allocations.erase(found);
  ++changes;
}

void free_memory(void* begin) {
  if (begin != nullptr) {
    unregister_memory(begin);
    std::free(static_cast<char*>(begin) - kGap);
  }
}

struct GuardedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::kCPU);
    if (bytes == 0) {
      return {nullptr, nullptr, &free_memory, cpu};
    }
    const size_t whole = (bytes + 2 * kGap + kAlignment - 1) / kAlignment * kAlignment;
    auto* const memory = static_cast<char*>(std::aligned_alloc(kAlignment, whole));
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    char* const begin = memory + kGap;
    if (bytes <= kMostFilled) {
      fill_never_written(begin, bytes);
    }
    register_memory(begin, bytes, MemoryOf::kDevice);
    return {begin, begin, &free_memory, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_memory; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

// From the moment this library is loaded, which is before the first tensor of a test.
[[maybe_unused]] const bool installed = [] {
  c10::SetCPUAllocator(new GuardedAllocator(), /*priority=*/200);
  return true;
}();

bool is_shared(uintptr_t at) {
  return at - reinterpret_cast<uintptr_t>(shared_memory) < sizeof(shared_memory);
}

// Null unless the access is to one variable of the running thread's own block.
SharedVariable* find_shared(uintptr_t place, size_t bytes) {
  for (auto& variable : shared_variables) {
    if (variable.contains(place, bytes)) {
      return &variable;
    }
  }
  return nullptr;
}

}  // namespace

void fill_never_written(void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  for (uintptr_t word = first; word < first + bytes; word += sizeof(uint64_t)) {
    const uint64_t value = never_written(word);
    std::memcpy(reinterpret_cast<void*>(word), &value, sizeof(value));
  }
}

void register_memory(void* begin, size_t bytes, MemoryOf owner) {
  const std::lock_guard<std::mutex> lock(mutex);
  Allocation& added = allocations[reinterpret_cast<uintptr_t>(begin)];
  added.begin = reinterpret_cast<uintptr_t>(begin);
  added.bytes = bytes;
  added.owner = owner;
  ++changes;
}

bool is_allocated(const void* begin, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  const Allocation* found = find_allocation(at);
  return bytes == 0 || (found != nullptr && found->contains(at, bytes));
}

void set_untracked(const void* stack_memory, size_t stack_bytes, const void* all_threads,
                   size_t thread_bytes) {
  stacks.begin = reinterpret_cast<uintptr_t>(stack_memory);
  stacks.bytes = stack_bytes;
  threads.begin = reinterpret_cast<uintptr_t>(all_threads);
  threads.bytes = thread_bytes;
}

void set_parameters(const void* begin, size_t bytes) {
  parameters.begin = reinterpret_cast<uintptr_t>(begin);
  parameters.bytes = bytes;
}

void forget_shared_variables() { shared_variables.clear(); }

void clear_shared(unsigned place) {
  fill_never_written(shared_memory + place * kSharedBytes, kSharedBytes);
}

void* shared_variable(int key, size_t bytes, size_t alignment) {
  size_t begin = kGap;
  for (const auto& variable : shared_variables) {
    if (variable.key == key) {
      return shared_memory + self().block_of->place * kSharedBytes + variable.begin;
    }
    begin = variable.begin + variable.bytes + kGap;
  }
  alignment =
      std::max(alignment, sizeof(uint64_t));  // so that no word is shared with the gap before
  begin = (begin + alignment - 1) / alignment * alignment;
  if (begin + bytes > kSharedBytes) {
    stop(format("too much shared memory (%zu bytes more)", bytes), __builtin_return_address(0));
  }
  SharedVariable added;
  added.begin = begin;
  added.bytes = bytes;
  added.key = key;
  for (unsigned place = 0; place < kMaxResident; ++place) {
    added.histories[place].of_bytes = shared_history + place * kSharedBytes + begin;
    added.histories[place].bytes = bytes;
  }
  shared_variables.push_back(added);
  return shared_memory + self().block_of->place * kSharedBytes + begin;
}

void check_access(const void* address, size_t bytes, Kind kind, bool aligned, const void* code,
                  const void* bytes_written) {
  settle_write();
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (stacks.contains(at) || threads.contains(at) || address == &current) {
    return;
  }
  if (parameters.contains(at)) {
    if (writes(kind)) {
      stop("out of bounds: a kernel writes to its parameters", code);
    }
    return;
  }
  maybe_preempt(kind);
  const char* const verb = writes(kind) ? "write" : "read";
  const bool shared = is_shared(at);
  const char* const space = shared ? "shared" : "global";
  Histories* histories = nullptr;
  size_t offset = 0;
  bool on_device = false;
  if (shared) {
    const unsigned place = self().block_of->place;
    offset = at - reinterpret_cast<uintptr_t>(shared_memory) - place * kSharedBytes;
    if (SharedVariable* found = find_shared(offset, bytes)) {
      histories = &found->histories[place];
      offset -= found->begin;
    }
  } else if (Allocation* found = find_again(at); found && found->contains(at, bytes)) {
    histories = &histories_of(*found);
    offset = at - found->begin;
    on_device = found->owner == MemoryOf::kDevice;
  }
  if (histories == nullptr) {
    stop(format("out of bounds (%s of %zu bytes): %s memory", verb, bytes, space), code);
  }
  if (aligned && at % bytes != 0) {
    stop(format("misaligned (%s of %zu bytes at %p): %s memory", verb, bytes, address, space),
         code);
  }
  if (kind != Kind::kWrite && kind != Kind::kVolatileWrite &&
      is_never_written(at, at - offset + histories->bytes)) {
    report(format("never written (%zu bytes): %s memory is read", bytes, space), code);
  }
  check_race(*histories, offset, {address, bytes, kind, space, code, bytes_written});
  if (counting && on_device) {
    count_access(at, bytes, kind, code);
  }
}

}  // namespace emulator
