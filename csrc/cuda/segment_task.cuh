// What the two kernels of dense_backward_segments.cu are given, and how they write a row.
#pragma once

#include <cstdint>

#include "lane_columns.cuh"
#include "row_notes.cuh"
#include "vector.cuh"

namespace embed_ext::cuda {

// Caps the registers: at 128 a thread of sum_tokens, at 64 of finish_rows, whose blocks are twice
// as large. Enough for the widest vectors without spills, while 16 warps of a multiprocessor or
// more, with four rows each, can wait for memory.
constexpr int kResidentBlocks = 2;

// In: the type of the gradient, Out: of the table, the same or float.
template <class In, class Out>
struct SegmentTask {
  using Acc = Accumulator<In>;

  const In* grad;            // [N, D]
  int64_t grad_stride;       // in elements
  const uint32_t* row;       // [N] of the sorted tokens, those that do not count last
  const uint32_t* position;  // [N] in grad
  RowNotes notes;
  Acc* heads;  // [tiles, chunks, vectors of a lane, lanes, width of a vector]: what a tile has of
               // the row that the tile before it ends with
  Acc* tails;  // the same of the row that begins in it and goes on after it
  Out* out;    // [num_rows, D]
  int64_t out_stride;
  int64_t num_tokens;  // N
  int64_t num_rows;    // tokens of this row and of those beyond it do not count
  int64_t width;       // D
  bool add;            // to what out holds
  bool scale_grad_by_freq;
};

// A lane's piece of a tile's heads and tails: whole vectors, whatever the width of a row, each
// beside those of the other lanes. tile_chunk: the tile's number * chunks + the chunk's
template <class Columns, class Acc>
__device__ auto partial_sum_of(int64_t tile_chunk, int lanes, int lane) {
  constexpr int kOfVector = kMaxVectorBytes / static_cast<int>(sizeof(Acc));
  constexpr int kWidth = Columns::kCount < kOfVector ? Columns::kCount : kOfVector;
  return LaneColumns<kWidth, Columns::kCount / kWidth>(tile_chunk, lanes, lane, INT64_MAX);
}

// The first i in [first, last] with i == last or sorted[i] >= value, found by one thread.
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

// out[row, the lane's columns] = sum, or the mean over `count` tokens where that is asked, plus
// what it holds where that is asked.
template <class Columns, class In, class Out>
__device__ void write_row(const SegmentTask<In, Out>& task, const Columns& columns, int64_t row,
                          int64_t count, Packed<Accumulator<In>, Columns::kCount> sum) {
  if (task.scale_grad_by_freq && count > 1) {
#pragma unroll
    for (int i = 0; i < Columns::kCount; ++i) {
      sum.values[i] /= static_cast<Accumulator<In>>(count);
    }
  }
  Out* const target = task.out + row * task.out_stride;
  if (task.add) {
    add(sum, columns.load_written(target));
  }
  Packed<Out, Columns::kCount> result;
#pragma unroll
  for (int i = 0; i < Columns::kCount; ++i) {
    result.values[i] = narrow<Out>(sum.values[i]);
  }
  columns.store(target, result);
}

}  // namespace embed_ext::cuda
