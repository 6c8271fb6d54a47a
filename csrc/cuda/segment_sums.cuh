// The sums that the segment kernels are made of; dense_backward_segments.cu explains the algorithm.
#pragma once

#include <cstdint>

#include "vector.cuh"

namespace embed_ext::cuda {

constexpr int64_t kChunk = 64;

constexpr int kRowsInFlight = 4;  // rows that a lane is waiting for at once

// T: the type of the gradient.
template <class T>
struct SegmentTask {
  const T* grad;
  int64_t grad_stride;         // in elements
  const uint32_t* row;         // [N] of the sorted tokens
  const uint32_t* position;    // [N] in grad
  const uint32_t* row_offset;  // [V + 1]
  Accumulator<T>* chunk_sums;  // [N / kChunk, D]
  Accumulator<T>* block_sums;  // [N / kChunk^2, D]
  T* out;                      // [V, D]
  int64_t num_tokens;
  int64_t num_rows;
  int64_t width;  // D
  bool scale_grad_by_freq;
};

// The sum of one vector of columns.
template <class T, int kCount>
using Sum = Packed<Accumulator<T>, kCount>;

template <class A, class T, int kCount>
__device__ void add(Packed<A, kCount>& sum, const Packed<T, kCount>& value) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sum.values[i] += widen(value.values[i]);
  }
}

// sum += rows [first, last) of an array, where source(i) is the address of the vector in row i.
template <class T, int kCount, class A, class Source>
__device__ void add_range(Packed<A, kCount>& sum, int64_t first, int64_t last,
                          const Source& source) {
#pragma unroll 1
  for (int64_t i = first; i < last; i += kRowsInFlight) {
    Packed<T, kCount> value[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      // Past the end, the last row once more: the loads need no branch, only the additions do.
      value[u] = load<T, kCount>(source(min(i + u, last - 1)));
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      if (i + u < last) {
        add(sum, value[u]);
      }
    }
  }
}

template <int kCount, class T>
__device__ void add_tokens(Sum<T, kCount>& sum, const SegmentTask<T>& task, int64_t first,
                           int64_t last, int64_t column) {
  add_range<T, kCount>(sum, first, last, [&](int64_t i) {
    return task.grad + static_cast<int64_t>(__ldg(task.position + i)) * task.grad_stride + column;
  });
}

// sums: chunk_sums or block_sums
template <int kCount, class A>
__device__ void add_sums(Packed<A, kCount>& sum, const A* sums, int64_t width, int64_t first,
                         int64_t last, int64_t column) {
  add_range<A, kCount>(sum, first, last, [&](int64_t i) { return sums + i * width + column; });
}

// The whole chunks (of `size` things) between two places: [first, last), empty if first >= last.
struct WholeChunks {
  int64_t first, last;
  __device__ WholeChunks(int64_t begin, int64_t end, int64_t size)
      : first((begin + size - 1) / size), last(end / size) {}
  __device__ bool any() const { return first < last; }
};

// sum += chunks [first, last), by blocks where these are whole.
template <int kCount, class T>
__device__ void add_chunks(Sum<T, kCount>& sum, const SegmentTask<T>& task, int64_t first,
                           int64_t last, int64_t column) {
  const WholeChunks blocks(first, last, kChunk);
  if (!blocks.any()) {
    return add_sums<kCount>(sum, task.chunk_sums, task.width, first, last, column);
  }
  add_sums<kCount>(sum, task.chunk_sums, task.width, first, blocks.first * kChunk, column);
  add_sums<kCount>(sum, task.block_sums, task.width, blocks.first, blocks.last, column);
  add_sums<kCount>(sum, task.chunk_sums, task.width, blocks.last * kChunk, last, column);
}

}  // namespace embed_ext::cuda
