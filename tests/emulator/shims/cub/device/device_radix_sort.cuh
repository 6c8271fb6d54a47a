// In place of CUB's: see sort_pairs() in runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "interface.h"

namespace cub {

template <class T>
struct DoubleBuffer {
  T* d_buffers[2];
  int selector = 0;

  DoubleBuffer(T* current, T* alternate) : d_buffers{current, alternate} {}
};

struct DeviceRadixSort {
  static cudaError_t SortPairs(void* workspace, size_t& bytes, DoubleBuffer<uint32_t>& keys,
                               DoubleBuffer<uint32_t>& values, uint32_t count, int begin_bit,
                               int end_bit, cudaStream_t /*stream*/) {
    return ::emulator::sort_pairs(workspace, bytes, keys.d_buffers, keys.selector, values.d_buffers,
                                  values.selector, count, begin_bit, end_bit);
  }
};

}  // namespace cub
