// The sums that the segment kernels are made of; dense_backward_segments.cu explains the algorithm.
// dense_backward_few.cu shares those that need no sorted tokens.
#pragma once

#include <cstdint>

#include "sorted_search.cuh"
#include "vector.cuh"

namespace embed_ext::cuda {

constexpr int64_t kChunk = 64;

constexpr int kRowsInFlight = 4;  // rows that a lane is waiting for at once

// In: the type of the gradient, Out: of the table, the same or float.
template <class In, class Out>
struct SegmentTask {
  using Acc = Accumulator<In>;

  const In* grad;
  int64_t grad_stride;         // in elements
  const uint32_t* row;         // [N] of the sorted tokens
  const uint32_t* position;    // [N] in grad
  const uint32_t* row_offset;  // [V + 1], or null: only the rows in use are written
  Acc* chunk_sums;             // [N / kChunk, D]
  Acc* block_sums;             // [N / kChunk^2, D]
  Out* out;                    // [V, D]
  int64_t out_stride;
  int64_t num_tokens;
  int64_t num_rows;
  int64_t width;  // D
  bool add;       // to what out holds
  bool scale_grad_by_freq;
};

// The sum of one vector of columns.
template <class Task, int kCount>
using Sum = Packed<typename Task::Acc, kCount>;

// The tokens of a row. `near` is the place of one of them.
struct Segment {
  int64_t begin, end;
};

template <class Task>
__device__ Segment segment_of(const Task& task, int64_t row, int64_t near) {
  if (task.row_offset != nullptr) {
    return {task.row_offset[row], task.row_offset[row + 1]};
  }
  return {lower_bound(task.row, 0, near, row),
          lower_bound(task.row, near + 1, task.num_tokens, row + 1)};
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

template <int kCount, class In, class Out>
__device__ void add_tokens(Sum<SegmentTask<In, Out>, kCount>& sum, const SegmentTask<In, Out>& task,
                           int64_t first, int64_t last, int64_t column) {
  add_range<In, kCount>(sum, first, last, [&](int64_t i) {
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
template <int kCount, class Task>
__device__ void add_chunks(Sum<Task, kCount>& sum, const Task& task, int64_t first, int64_t last,
                           int64_t column) {
  const WholeChunks blocks(first, last, kChunk);
  if (!blocks.any()) {
    return add_sums<kCount>(sum, task.chunk_sums, task.width, first, last, column);
  }
  add_sums<kCount>(sum, task.chunk_sums, task.width, first, blocks.first * kChunk, column);
  add_sums<kCount>(sum, task.block_sums, task.width, blocks.first, blocks.last, column);
  add_sums<kCount>(sum, task.chunk_sums, task.width, blocks.last * kChunk, last, column);
}

// out[row, column..] = sum, or the mean over `count` tokens, plus what it holds if that is asked.
template <int kCount, class Task>
__device__ void write_row(const Task& task, int64_t row, int64_t column, int64_t count,
                          Sum<Task, kCount> sum) {
  if (task.scale_grad_by_freq && count > 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum.values[i] /= static_cast<typename Task::Acc>(count);
    }
  }
  using Out = std::remove_pointer_t<decltype(task.out)>;
  Out* const target = task.out + row * task.out_stride + column;
  if (task.add) {
    add(sum, load_written<Out, kCount>(target));
  }
  Packed<Out, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    result.values[i] = narrow<Out>(sum.values[i]);
  }
  store(target, result);
}

}  // namespace embed_ext::cuda
