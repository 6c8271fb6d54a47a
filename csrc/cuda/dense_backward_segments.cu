// Dense gradient by segments: tokens are sorted by row, and every row of the table is written once,
// as the sum of its tokens or as zeros, so that nothing has to be filled with zeros before. Where
// the table is zero already or is to be added to, only the rows in use are read and written.
//
// A row used very often would keep one warp busy while all others have finished. So the sorted
// tokens are first cut, at fixed places, into chunks of kChunk, and these into blocks of kChunk
// chunks. Chunks and blocks that lie within one row are summed beforehand, all at the same time; a
// row then adds them up instead of their tokens. With kChunk = 4 instead of 64:
//
//   sorted rows   2 2 2 5 | 5 5 5 5 | 5 5 5 5 | 5 7 7 9 |
//   chunk sums            |   c1    |   c2    |              chunks 0 and 3 hold several rows
//   row 5         token 3 +   c1    +   c2    + token 12
//   row 7         token 13 + token 14
//   rows 0, 1, 3, 4, 6, 8: zeros
//
// The cuts depend on the number of tokens only and the sort is stable, so that every run adds the
// same numbers in the same order.
#include <c10/cuda/CUDAException.h>

#include "dense_backward.cuh"
#include "dispatch.cuh"
#include "group_by_row.cuh"
#include "launch_math.h"
#include "scratch.h"
#include "segment_sums.cuh"
#include "vector.cuh"

namespace embed_ext::cuda {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

// Caps the registers at 80 a thread: enough for the widest vectors without spills, and 24 warps of
// a multiprocessor can wait for memory.
constexpr int kResidentBlocks = 3;

// A warp owns (one chunk of tokens, one warp's width of columns) and leaves unless the chunk lies
// within one row of the table. kLevel 0 sums tokens to chunks, 1 sums chunks to blocks.
template <int kCount, int kLevel, class Task>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    sum_chunks(Task task, Divider column_chunks) {
  const int64_t tokens_per_chunk = kLevel == 0 ? kChunk : kChunk * kChunk;
  const int64_t item = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarpSize;
  const int64_t chunk = column_chunks.quotient(item);
  if (chunk >= task.num_tokens / tokens_per_chunk) {
    return;
  }
  const int64_t first_vector = (item - chunk * column_chunks.divisor()) * kWarpSize;
  const int64_t column = (first_vector + threadIdx.x % kWarpSize) * kCount;
  const auto row = static_cast<int64_t>(task.row[chunk * tokens_per_chunk]);
  const auto last_row = static_cast<int64_t>(task.row[(chunk + 1) * tokens_per_chunk - 1]);
  if (row != last_row || row >= task.num_rows || column >= task.width) {
    return;
  }
  Sum<Task, kCount> sum{};
  if constexpr (kLevel == 0) {
    add_tokens<kCount>(sum, task, chunk * kChunk, (chunk + 1) * kChunk, column);
    store(task.chunk_sums + chunk * task.width + column, sum);
  } else {
    add_sums<kCount>(sum, task.chunk_sums, task.width, chunk * kChunk, (chunk + 1) * kChunk,
                     column);
    store(task.block_sums + chunk * task.width + column, sum);
  }
}

constexpr uint32_t kNoToken = 0xffffffffu;  // group_by_row() allows fewer tokens than this
constexpr uint32_t kNotShort = 0xffffffffu;

// A row that one lane has found for its warp to write.
struct ShortRow {
  uint32_t row = 0;
  uint32_t begin = 0;
  uint32_t count = kNotShort;  // of its tokens
  uint32_t first_token = kNoToken;
};

// The i-th row of the table or, if only the rows in use are written, the one whose tokens begin at
// the i-th; left alone if there is none, or if it contains a whole chunk.
template <class Task>
__device__ ShortRow find_short_row(const Task& task, int64_t i) {
  ShortRow found;
  int64_t begin, end;
  if (task.row_offset != nullptr) {
    if (i >= task.num_rows) {
      return found;
    }
    found.row = static_cast<uint32_t>(i);
    begin = __ldg(task.row_offset + i);
    end = __ldg(task.row_offset + i + 1);
  } else {
    if (i >= task.num_tokens) {
      return found;
    }
    found.row = __ldg(task.row + i);
    if (found.row >= task.num_rows || (i > 0 && __ldg(task.row + i - 1) == found.row)) {
      return found;
    }
    begin = i;  // any row of this many tokens contains a whole chunk
    end =
        lower_bound(task.row, i + 1, min(i + 2 * kChunk, task.num_tokens), int64_t{found.row} + 1);
  }
  if (!WholeChunks(begin, end, kChunk).any()) {
    found.begin = static_cast<uint32_t>(begin);
    found.count = static_cast<uint32_t>(end - begin);
    found.first_token = begin < end ? __ldg(task.position + begin) : kNoToken;
  }
  return found;
}

// Rows that contain no whole chunk. A warp owns (32 neighbouring rows of the table, or tokens where
// only the rows in use are written; one chunk of the columns). Each lane first looks one row up.
// Then groups of `lanes` lanes write the rows, a lane one vector of kCount columns: neighbouring
// groups write neighbouring rows, and each group has the first tokens of four rows under way at
// once, since most rows have one token or none.
template <int kCount, class In, class Out>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    write_short_rows(SegmentTask<In, Out> task, int lanes, Divider column_chunks) {
  const int lane = threadIdx.x % kWarpSize;
  const int groups = kWarpSize / lanes;
  const int group = lane / lanes;
  const int64_t item = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarpSize;
  const int64_t tile = column_chunks.quotient(item);
  if (tile >= ceil_div(task.row_offset == nullptr ? task.num_tokens : task.num_rows, kWarpSize)) {
    return;
  }
  const int64_t chunk = item - tile * column_chunks.divisor();
  const int64_t column = (chunk * lanes + (lane & (lanes - 1))) * kCount;
  const ShortRow found = find_short_row(task, tile * kWarpSize + lane);
  for (int k = 0; k < lanes; k += kRowsInFlight) {
    Packed<In, kCount> value[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const int from = min(k + u, lanes - 1) * groups + group;
      const uint32_t token = __shfl_sync(kFullWarp, found.first_token, from);
      value[u] = Packed<In, kCount>{};
      if (token != kNoToken && column < task.width) {
        value[u] = load<In, kCount>(task.grad + token * task.grad_stride + column);
      }
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const int from = min(k + u, lanes - 1) * groups + group;
      const int64_t row = __shfl_sync(kFullWarp, found.row, from);
      const int64_t begin = __shfl_sync(kFullWarp, found.begin, from);
      const uint32_t count = __shfl_sync(kFullWarp, found.count, from);
      if (k + u < lanes && count != kNotShort && column < task.width) {
        Sum<SegmentTask<In, Out>, kCount> sum{};
        add(sum, value[u]);
        add_tokens<kCount>(sum, task, begin + 1, begin + count, column);
        write_row<kCount>(task, row, column, count, sum);
      }
    }
  }
}

// The other rows. A warp owns (one chunk of tokens, one warp's width of columns) and leaves unless
// the chunk is the first that lies within its row of the table: then it writes that row.
template <int kCount, class Task>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    write_long_rows(Task task, Divider column_chunks) {
  const int64_t item = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarpSize;
  const int64_t chunk = column_chunks.quotient(item);
  if (chunk >= task.num_tokens / kChunk) {
    return;
  }
  const int64_t first_vector = (item - chunk * column_chunks.divisor()) * kWarpSize;
  const int64_t column = (first_vector + threadIdx.x % kWarpSize) * kCount;
  const int64_t row = task.row[chunk * kChunk];
  const int64_t last_row = task.row[(chunk + 1) * kChunk - 1];
  if (row != last_row || row >= task.num_rows || column >= task.width) {
    return;
  }
  const auto [begin, end] = segment_of(task, row, chunk * kChunk);
  const WholeChunks chunks(begin, end, kChunk);
  if (chunk != chunks.first) {
    return;
  }
  Sum<Task, kCount> sum{};
  add_tokens<kCount>(sum, task, begin, chunks.first * kChunk, column);
  add_chunks<kCount>(sum, task, chunks.first, chunks.last, column);
  add_tokens<kCount>(sum, task, chunks.last * kChunk, end, column);
  write_row<kCount>(task, row, column, end - begin, sum);
}

template <int kCount, class In, class Out>
void launch_segments(const SegmentTask<In, Out>& task, cudaStream_t stream) {
  const auto share = lanes_for_row(task.width / kCount);
  const int64_t column_chunks = ceil_div(task.width / kCount, kWarpSize);
  const auto grid = [](int64_t items) { return grid_blocks(items, kBlockWarps); };
  const int64_t chunks = task.num_tokens / kChunk;
  if (chunks > 0) {
    sum_chunks<kCount, 0>
        <<<grid(chunks * column_chunks), kBlockThreads, 0, stream>>>(task, Divider(column_chunks));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (chunks / kChunk > 0) {
    sum_chunks<kCount, 1><<<grid(chunks / kChunk * column_chunks), kBlockThreads, 0, stream>>>(
        task, Divider(column_chunks));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (chunks > 0) {
    write_long_rows<kCount>
        <<<grid(chunks * column_chunks), kBlockThreads, 0, stream>>>(task, Divider(column_chunks));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t tiles =
      ceil_div(task.row_offset == nullptr ? task.num_tokens : task.num_rows, kWarpSize);
  write_short_rows<kCount><<<grid(tiles * share.chunks), kBlockThreads, 0, stream>>>(
      task, share.lanes, Divider(share.chunks));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class In, class Out>
void launch_with_width(const SegmentTask<In, Out>& task, cudaStream_t stream) {
  // No more than one vector of either type: wider sums would not fit the registers.
  constexpr int kMost = kMaxVectorBytes / static_cast<int>(std::max(sizeof(In), sizeof(Out)));
  const int elements =
      vector_elements({sizeof(In), address(task.grad), task.grad_stride},
                      {sizeof(Out), address(task.out), task.out_stride}, task.width);
  if (elements >= kMost) {
    launch_segments<kMost>(task, stream);
  } else if (elements >= kMost / 2) {
    launch_segments<kMost / 2>(task, stream);
  } else if (elements >= 2) {
    launch_segments<2>(task, stream);
  } else {
    launch_segments<1>(task, stream);
  }
}

}  // namespace

void add_segments(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream) {
  add_segments(task, group_by_row(task.indices, task.padding_idx, errors, stream), stream);
}

void add_segments(const DenseBackwardTask& task, const RowGroups& groups, cudaStream_t stream) {
  const int64_t num_tokens = groups.row.numel();
  const int64_t num_rows = task.out.size(0);
  const int64_t width = task.out.size(1);
  at::Tensor offsets;  // undefined: only the rows in use are written
  if (task.rows == RowsOfOut::kAllWritten) {
    offsets = row_offsets(groups, num_rows, stream);
  }
  const bool is_double = task.grad.scalar_type() == at::kDouble;
  const auto sum_options = task.grad.options().dtype(is_double ? at::kDouble : at::kFloat);
  const auto chunk_sums = scratch({num_tokens / kChunk, width}, sum_options);
  const auto block_sums = scratch({num_tokens / (kChunk * kChunk), width}, sum_options);

  with_gradient_types(task.grad.scalar_type(), task.out.scalar_type(), [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    launch_with_width(
        SegmentTask<In, Out>{static_cast<const In*>(task.grad.const_data_ptr()),
                             task.grad.stride(0), as_uint32(groups.row), as_uint32(groups.position),
                             offsets.defined() ? as_uint32(offsets) : nullptr,
                             static_cast<Accumulator<In>*>(chunk_sums.mutable_data_ptr()),
                             static_cast<Accumulator<In>*>(block_sums.mutable_data_ptr()),
                             static_cast<Out*>(task.out.mutable_data_ptr()), task.out.stride(0),
                             num_tokens, num_rows, width, task.rows == RowsOfOut::kAdded,
                             task.scale_grad_by_freq},
        stream);
  });
}

}  // namespace embed_ext::cuda
