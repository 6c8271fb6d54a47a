// How wide the loads and stores of a kernel may be. Plain C++, tested on the CPU.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace embed_ext::cuda {

constexpr int kMaxVectorBytes = 16;  // the widest load of one thread on every architecture built

// The largest power of two, at most 16, that divides every value. Hand over all byte addresses,
// row lengths and row strides that a kernel combines: it may then move that many bytes at a time.
inline int vector_bytes(std::initializer_list<uint64_t> values) {
  uint64_t bits = kMaxVectorBytes;
  for (const uint64_t value : values) {
    bits |= value;
  }
  return static_cast<int>(bits & (~bits + 1));  // the lowest set bit
}

inline uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace embed_ext::cuda
