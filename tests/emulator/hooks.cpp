// Where device code meets memory.
//
// Translated files are compiled with -fsanitize=thread but linked without its library: the compiler
// then calls __tsan_read4() and the like before each plain access, and these functions are ours.
// What is one instruction on a GPU but several accesses in C++ comes by the functions below them.
#include <cmath>
#include <cstring>

#include "emulator.h"

namespace emulator {
namespace {

// Reductions of float32 flush numbers below the smallest normal one, on every architecture.
float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}
double flushed(double value) { return value; }

template <class T>
void add_all(T* to, const T* values, int count, const void* code) {
  check_access(to, count * sizeof(T), Kind::kReduction, true, code);
  for (int i = 0; i < count; ++i) {
    to[i] = flushed(flushed(to[i]) + flushed(values[i]));
  }
}

}  // namespace

void load(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, Kind::kRead, true, __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, size_t bytes) {
  check_access(to, bytes, Kind::kWrite, true, __builtin_return_address(0), from);
  std::memcpy(to, from, bytes);
}

void atomic_add(float* to, const float* values, int count) {
  add_all(to, values, count, __builtin_return_address(0));
}

void atomic_add(double* to, const double* values, int count) {
  add_all(to, values, count, __builtin_return_address(0));
}

unsigned compare_and_swap(unsigned* address, unsigned expected, unsigned desired) {
  check_access(address, sizeof(unsigned), Kind::kAtomic, true, __builtin_return_address(0));
  const unsigned old = *address;
  if (old == expected) {
    *address = desired;
  }
  return old;
}

}  // namespace emulator

#define HOOK extern "C"
#define ACCESS(NAME, BYTES, KIND, ALIGNED)                                  \
  HOOK void NAME(void* address) {                                           \
    if (emulator::current != nullptr) {                                     \
      emulator::check_access(address, BYTES, emulator::Kind::KIND, ALIGNED, \
                             __builtin_return_address(0));                  \
    }                                                                       \
  }
#define ACCESSES(BYTES)                                           \
  ACCESS(__tsan_read##BYTES, BYTES, kRead, true)                  \
  ACCESS(__tsan_write##BYTES, BYTES, kWrite, true)                \
  ACCESS(__tsan_unaligned_read##BYTES, BYTES, kRead, false)       \
  ACCESS(__tsan_unaligned_write##BYTES, BYTES, kWrite, false)     \
  ACCESS(__tsan_volatile_read##BYTES, BYTES, kVolatileRead, true) \
  ACCESS(__tsan_volatile_write##BYTES, BYTES, kVolatileWrite, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

#define RANGE(NAME, KIND)                                                 \
  HOOK void NAME(void* address, size_t bytes) {                           \
    if (emulator::current != nullptr) {                                   \
      emulator::check_access(address, bytes, emulator::Kind::KIND, false, \
                             __builtin_return_address(0));                \
    }                                                                     \
  }
RANGE(__tsan_read_range, kRead)
RANGE(__tsan_write_range, kWrite)

HOOK void __tsan_init() {}
HOOK void __tsan_vptr_update(void** /*object*/, void* /*value*/) {}
HOOK void __tsan_vptr_read(void** /*object*/) {}
HOOK void __tsan_atomic_thread_fence(int /*order*/) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Atomics of host code: std::atomic, and the counters of shared pointers.
#define ATOMICS(BITS, T)                                                                          \
  HOOK T __tsan_atomic##BITS##_load(const volatile T* at, int) {                                  \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                               \
  HOOK void __tsan_atomic##BITS##_store(volatile T* at, T value, int) {                           \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                               \
  HOOK T __tsan_atomic##BITS##_exchange(volatile T* at, T value, int) {                           \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                      \
  }                                                                                               \
  HOOK T __tsan_atomic##BITS##_fetch_add(volatile T* at, T value, int) {                          \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                       \
  }                                                                                               \
  HOOK T __tsan_atomic##BITS##_fetch_sub(volatile T* at, T value, int) {                          \
    return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                       \
  }                                                                                               \
  HOOK bool __tsan_atomic##BITS##_compare_exchange_strong(volatile T* at, T* old, T desired, int, \
                                                          int) {                                  \
    return __atomic_compare_exchange_n(at, old, desired, false, __ATOMIC_SEQ_CST,                 \
                                       __ATOMIC_SEQ_CST);                                         \
  }                                                                                               \
  HOOK bool __tsan_atomic##BITS##_compare_exchange_weak(volatile T* at, T* old, T desired, int,   \
                                                        int) {                                    \
    return __atomic_compare_exchange_n(at, old, desired, false, __ATOMIC_SEQ_CST,                 \
                                       __ATOMIC_SEQ_CST);                                         \
  }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
