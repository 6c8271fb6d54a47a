// In place of CUB's: all threads of a block leave their keys in shared memory, the first one sorts
// them, and all take their share of the result.
#pragma once

#include <cstdint>

#include "interface.h"

namespace cub {

template <class Key, int kThreads, int kItems, class Value>
class BlockRadixSort {
 public:
  struct TempStorage {
    Key keys[kThreads * kItems];
    Value values[kThreads * kItems];
  };

  explicit BlockRadixSort(TempStorage& storage) : storage_(storage) {}

  // From thread t's items t * kItems + u to its items t + u * kThreads.
  void SortBlockedToStriped(Key (&keys)[kItems], Value (&values)[kItems], int begin_bit,
                            int end_bit) {
    const unsigned thread = ::emulator::current->thread.x;
    for (int u = 0; u < kItems; ++u) {
      storage_.keys[thread * kItems + u] = keys[u];
      storage_.values[thread * kItems + u] = values[u];
    }
    ::emulator::sync_threads();
    if (thread == 0) {
      ::emulator::sort_shared(storage_.keys, storage_.values, kThreads * kItems, begin_bit,
                              end_bit);
    }
    ::emulator::sync_threads();
    for (int u = 0; u < kItems; ++u) {
      keys[u] = storage_.keys[thread + u * kThreads];
      values[u] = storage_.values[thread + u * kThreads];
    }
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
