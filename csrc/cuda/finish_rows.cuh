// Second kernel of dense_backward_segments.cu: the rows that no tile could write alone.
#pragma once

#include <cstdint>

#include "launch_math.h"
#include "segment_task.cuh"
#include "vector.cuh"

namespace embed_ext::cuda {

constexpr int kVectorsPerThread = 4;
constexpr int kVectorsOfBlock = kFinishThreads * kVectorsPerThread;

// Which blocks of the kernel have which kind of work: first those that join.
struct FinishPlan {
  int64_t join_blocks;  // for each tile but the last, for each chunk of the columns
  Divider chunks;       // of the columns
  Divider width;        // D, or 1 if that is 0
};

// sum += the lane's `own` piece of partial + i * stride for i in [first, last), in their order
template <class Own, class A>
__device__ void add_partial_sums(Packed<A, Own::kCount>& sum, const Own& own, const A* partial,
                                 int64_t stride, int64_t first, int64_t last) {
#pragma unroll 1
  for (int64_t i = first; i < last; i += kRowsInFlight) {
    Packed<A, Own::kCount> value[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      value[u] = own.load_if(i + u < last, partial + (i + u) * stride);
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      add(sum, value[u]);
    }
  }
}

// The sum of all groups' sums, in the first group. All lanes of the block take part.
template <class Sum>
__device__ Sum sum_of_groups(Sum sum, int lanes) {
  __shared__ Sum warp_sum[kFinishThreads / kWarpSize][kWarpSize];
  const int lane = threadIdx.x % kWarpSize;
  for (int distance = kWarpSize / 2; distance >= lanes; distance /= 2) {
#pragma unroll
    for (int i = 0; i < Sum::kSize; ++i) {
      sum.values[i] += __shfl_down_sync(kFullWarp, sum.values[i], distance);
    }
  }
  warp_sum[threadIdx.x / kWarpSize][lane] = sum;
  __syncthreads();
  for (int w = 1; threadIdx.x < lanes && w < kFinishThreads / kWarpSize; ++w) {
    add(sum, warp_sum[w][lane]);
  }
  return sum;
}

// The row that goes on after tile `number`, if it begins in that tile: the block's groups share the
// heads of the tiles after it. All threads of the block.
template <class Columns, class In, class Out>
__device__ void join_row(const SegmentTask<In, Out>& task, const Columns& columns, int64_t number,
                         int tile_tokens, int lanes, int64_t chunks) {
  const int64_t first = number * tile_tokens;
  const int64_t next = first + tile_tokens;
  const uint32_t row = __ldg(task.row + next);
  if (row >= task.num_rows || __ldg(task.row + next - 1) != row ||
      (first > 0 && __ldg(task.row + first - 1) == row)) {
    return;
  }
  const int64_t end = lower_bound(task.row, next + 1, task.num_tokens, int64_t{row} + 1);
  const int64_t heads = (end - 1) / tile_tokens - number;
  const int64_t share = ceil_div(heads, kFinishThreads / lanes);
  const int64_t begin = min(threadIdx.x / lanes * share, heads);
  const auto own = partial_sum_of<Columns, Accumulator<In>>(blockIdx.x, lanes, threadIdx.x % lanes);
  const int64_t stride = chunks * lanes * Columns::kCount;
  Packed<Accumulator<In>, Columns::kCount> sum{};
  add_partial_sums(sum, own, task.heads + stride, stride, begin, min(begin + share, heads));
  sum = sum_of_groups(sum, lanes);
  if (threadIdx.x < lanes) {
    add_partial_sums(sum, own, task.tails, stride, 0, 1);
    const int64_t count =
        task.scale_grad_by_freq ? end - lower_bound(task.row, first, next, row) : 1;
    write_row(task, columns, row, count, sum);
  }
}

// A thread owns kVectorsPerThread vectors of the table, a block's width apart: zeros in what they
// have of rows that are not in use. Rows of any width are cleared by whole vectors, but where one
// holds the end of such a row and the beginning of another.
template <class In, class Out>
__device__ void clear_unused_rows(const SegmentTask<In, Out>& task, const FinishPlan& plan) {
  constexpr int kElements = kMaxVectorBytes / sizeof(Out);
  const uint8_t* const used = task.notes.used;
  const int64_t num_elements = task.num_rows * task.width;
  const int64_t first = int64_t{blockIdx.x - plan.join_blocks} * kVectorsOfBlock + threadIdx.x;
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    const int64_t begin = (first + u * kFinishThreads) * kElements;
    const int64_t end = min(begin + kElements, num_elements);
    if (begin >= end) {
      return;
    }
    const int64_t row = plan.width.quotient(begin);
    const int64_t last_row = plan.width.quotient(end - 1);
    bool all_unused = end - begin == kElements;
    for (int64_t r = row; r <= last_row; ++r) {
      all_unused &= used[r] == 0;
    }
    if (all_unused) {
      store(task.out + begin, Packed<Out, kElements>{});
    } else if (row < last_row || used[row] == 0) {
      for (int64_t i = begin; i < end; ++i) {
        if (used[plan.width.quotient(i)] == 0) {
          task.out[i] = Out{};
        }
      }
    }
  }
}

// A block either owns (one tile, one chunk of the columns) for join_row(), and most often has
// nothing to do, or a piece of the table for clear_unused_rows().
template <class Tag, class In, class Out>
__global__ void __launch_bounds__(kFinishThreads, kResidentBlocks)
    finish_rows(SegmentTask<In, Out> task, TokenTiles tiles, FinishPlan plan) {
  using Columns = LaneColumns<Tag::kWidth, Tag::kVectors>;
  if (blockIdx.x >= plan.join_blocks) {
    return clear_unused_rows(task, plan);
  }
  const int64_t chunks = plan.chunks.divisor();
  const int64_t number = plan.chunks.quotient(blockIdx.x);
  const Columns columns(blockIdx.x - number * chunks, tiles.lanes, threadIdx.x % tiles.lanes,
                        task.width);
  join_row(task, columns, number, tiles.tokens(), tiles.lanes, chunks);
}

}  // namespace embed_ext::cuda
