// How wide the loads and stores of a kernel may be. Plain C++, tested on the CPU.
#pragma once

#include <algorithm>
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

// Rows that a kernel reads or writes, `stride` elements apart.
struct RowsInMemory {
  uint64_t element_bytes;
  uint64_t address;
  int64_t stride;
};

// How many neighbouring elements of a row of a matrix [*, width] one access may take.
inline int vector_elements(const RowsInMemory& rows, int64_t width) {
  const int bytes =
      vector_bytes({rows.address, static_cast<uint64_t>(rows.stride) * rows.element_bytes,
                    static_cast<uint64_t>(width) * rows.element_bytes});
  return bytes / static_cast<int>(rows.element_bytes);
}

// How many of them a thread may take at a time from one matrix to another.
inline int vector_elements(const RowsInMemory& from, const RowsInMemory& to, int64_t width) {
  return std::min(vector_elements(from, width), vector_elements(to, width));
}

}  // namespace embed_ext::cuda
