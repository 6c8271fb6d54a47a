// Which of the two dense backward algorithms a call runs. Plain C++, tested on the CPU.
#pragma once

#include <cstdint>

namespace embed_ext::cuda {

enum class DenseBackward {
  kAtomic,    // fill with zeros, then add every token's row with atomic adds
  kSegments,  // sort tokens by row, then write every row of the table once; deterministic
};

struct DenseBackwardCase {
  int64_t num_indices;      // N
  int64_t num_weights;      // V
  bool low_precision;       // the sums go to a bfloat16 or float16 table
  bool scale_grad_by_freq;  // the sum is divided by how often the row occurs
  bool deterministic;       // torch.use_deterministic_algorithms
};

// Mean occurrences of a row above which the sort pays for itself: atomic adds to one address queue
// up. An estimate that has not been measured on a GPU.
constexpr int64_t kManyDuplicates = 8;

constexpr DenseBackward choose_dense_backward(const DenseBackwardCase& call) {
  // With low precision each atomic add would round.
  const bool atomics = !call.deterministic && !call.scale_grad_by_freq && !call.low_precision;
  if (atomics && call.num_indices / kManyDuplicates <= call.num_weights) {
    return DenseBackward::kAtomic;
  }
  return DenseBackward::kSegments;
}

}  // namespace embed_ext::cuda
