// Binary search in sorted rows, by one thread.
#pragma once

#include <cstdint>

namespace embed_ext::cuda {

// The first i in [first, last] with i == last or sorted[i] >= value.
__device__ inline int64_t lower_bound(const uint32_t* sorted, int64_t first, int64_t last,
                                      int64_t value) {
  while (first < last) {
    const int64_t middle = first + (last - first) / 2;
    if (static_cast<int64_t>(sorted[middle]) < value) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

}  // namespace embed_ext::cuda
