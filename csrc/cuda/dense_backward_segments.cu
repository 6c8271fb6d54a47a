// Dense gradient by segments: tokens are sorted by row, and every row of the table is written once,
// as the sum of its tokens or as zeros, so that nothing has to be filled with zeros before.
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
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>

#include "dense_backward.cuh"
#include "dispatch.cuh"
#include "group_by_row.cuh"
#include "launch_math.h"
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
template <class T, int kCount, int kLevel>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    sum_chunks(SegmentTask<T> task, Divider column_chunks) {
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
  Sum<T, kCount> sum{};
  if constexpr (kLevel == 0) {
    add_tokens<kCount>(sum, task, chunk * kChunk, (chunk + 1) * kChunk, column);
    store(task.chunk_sums + chunk * task.width + column, sum);
  } else {
    add_sums<kCount>(sum, task.chunk_sums, task.width, chunk * kChunk, (chunk + 1) * kChunk,
                     column);
    store(task.block_sums + chunk * task.width + column, sum);
  }
}

// out[row, column..] = sum, or the mean over `count` tokens.
template <int kCount, class T>
__device__ void write_row(const SegmentTask<T>& task, int64_t row, int64_t column, int64_t count,
                          Sum<T, kCount> sum) {
  if (task.scale_grad_by_freq && count > 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum.values[i] /= static_cast<Accumulator<T>>(count);
    }
  }
  Packed<T, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    result.values[i] = narrow<T>(sum.values[i]);
  }
  store(task.out + row * task.width + column, result);
}

constexpr uint32_t kNoToken = 0xffffffffu;  // group_by_row() allows fewer tokens than this
constexpr uint32_t kNotShort = 0xffffffffu;

// Rows that contain no whole chunk. A warp owns (32 neighbouring rows of the table, one chunk of
// the columns). Lane i first reads where the tokens of row i are. Then groups of `lanes` lanes
// write the rows, a lane one vector of kCount columns: neighbouring groups write neighbouring rows,
// and each group has the first tokens of four rows under way at once, since most rows have one
// token or none.
template <class T, int kCount>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    write_short_rows(SegmentTask<T> task, int lanes, Divider column_chunks) {
  const int lane = threadIdx.x % kWarpSize;
  const int groups = kWarpSize / lanes;
  const int group = lane / lanes;
  const int64_t item = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarpSize;
  const int64_t tile = column_chunks.quotient(item);
  if (tile >= ceil_div(task.num_rows, kWarpSize)) {
    return;
  }
  const int64_t chunk = item - tile * column_chunks.divisor();
  const int64_t column = (chunk * lanes + (lane & (lanes - 1))) * kCount;
  const int64_t first_row = tile * kWarpSize;
  // Rows past the end of the table are left alone like long ones.
  uint32_t begin = 0, count = kNotShort, first_token = kNoToken;
  if (first_row + lane < task.num_rows) {
    begin = __ldg(task.row_offset + first_row + lane);
    const uint32_t end = __ldg(task.row_offset + first_row + lane + 1);
    if (!WholeChunks(begin, end, kChunk).any()) {
      count = end - begin;
      first_token = count > 0 ? __ldg(task.position + begin) : kNoToken;
    }
  }
  for (int k = 0; k < lanes; k += kRowsInFlight) {
    Packed<T, kCount> value[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const int from = min(k + u, lanes - 1) * groups + group;
      const uint32_t token = __shfl_sync(kFullWarp, first_token, from);
      value[u] = Packed<T, kCount>{};
      if (token != kNoToken && column < task.width) {
        value[u] = load<T, kCount>(task.grad + token * task.grad_stride + column);
      }
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const int from = min(k + u, lanes - 1) * groups + group;
      const int64_t row_begin = __shfl_sync(kFullWarp, begin, from);
      const uint32_t row_count = __shfl_sync(kFullWarp, count, from);
      if (k + u < lanes && row_count != kNotShort && column < task.width) {
        Sum<T, kCount> sum{};
        add(sum, value[u]);
        add_tokens<kCount>(sum, task, row_begin + 1, row_begin + row_count, column);
        write_row<kCount>(task, first_row + from, column, row_count, sum);
      }
    }
  }
}

// The other rows. A warp owns (one chunk of tokens, one warp's width of columns) and leaves unless
// the chunk is the first that lies within its row of the table: then it writes that row.
template <class T, int kCount>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    write_long_rows(SegmentTask<T> task, Divider column_chunks) {
  const int64_t item = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarpSize;
  const int64_t chunk = column_chunks.quotient(item);
  if (chunk >= task.num_tokens / kChunk) {
    return;
  }
  const int64_t first_vector = (item - chunk * column_chunks.divisor()) * kWarpSize;
  const int64_t column = (first_vector + threadIdx.x % kWarpSize) * kCount;
  const int64_t row = task.row[chunk * kChunk];
  if (row >= task.num_rows || column >= task.width) {
    return;
  }
  const int64_t begin = task.row_offset[row];
  const int64_t end = task.row_offset[row + 1];
  const WholeChunks chunks(begin, end, kChunk);
  if (chunk != chunks.first || !chunks.any()) {
    return;
  }
  Sum<T, kCount> sum{};
  add_tokens<kCount>(sum, task, begin, chunks.first * kChunk, column);
  add_chunks<kCount>(sum, task, chunks.first, chunks.last, column);
  add_tokens<kCount>(sum, task, chunks.last * kChunk, end, column);
  write_row<kCount>(task, row, column, end - begin, sum);
}

template <class T, int kCount>
void launch_segments(const SegmentTask<T>& task, cudaStream_t stream) {
  const auto share = lanes_for_row(task.width / kCount);
  const int64_t column_chunks = ceil_div(task.width / kCount, kWarpSize);
  const auto grid = [](int64_t items) { return grid_blocks(items, kBlockWarps); };
  const int64_t chunks = task.num_tokens / kChunk;
  if (chunks > 0) {
    sum_chunks<T, kCount, 0>
        <<<grid(chunks * column_chunks), kBlockThreads, 0, stream>>>(task, Divider(column_chunks));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (chunks / kChunk > 0) {
    sum_chunks<T, kCount, 1><<<grid(chunks / kChunk * column_chunks), kBlockThreads, 0, stream>>>(
        task, Divider(column_chunks));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (chunks > 0) {
    write_long_rows<T, kCount>
        <<<grid(chunks * column_chunks), kBlockThreads, 0, stream>>>(task, Divider(column_chunks));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t tiles = ceil_div(task.num_rows, kWarpSize);
  write_short_rows<T, kCount><<<grid(tiles * share.chunks), kBlockThreads, 0, stream>>>(
      task, share.lanes, Divider(share.chunks));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_with_width(const SegmentTask<T>& task, cudaStream_t stream) {
  constexpr uint64_t kSize = sizeof(T);
  switch (vector_bytes(
      {address(task.grad), address(task.out), task.grad_stride * kSize, task.width * kSize})) {
    case 16:
      return launch_segments<T, 16 / kSize>(task, stream);
    case 8:
      return launch_segments<T, 8 / kSize>(task, stream);
    case 4:
      return launch_segments<T, kSize <= 4 ? 4 / kSize : 1>(task, stream);
    default:
      return launch_segments<T, 1>(task, stream);
  }
}

}  // namespace

void add_segments(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream) {
  const int64_t num_tokens = task.indices.numel();
  const int64_t num_rows = task.out.size(0);
  const int64_t width = task.out.size(1);
  const auto groups = group_by_row(task.indices, task.padding_idx, errors, stream);
  const auto offsets = row_offsets(groups, num_rows, stream);
  const bool is_double = task.grad.scalar_type() == at::kDouble;
  const auto sum_options = task.grad.options().dtype(is_double ? at::kDouble : at::kFloat);
  const auto chunk_sums = at::empty({num_tokens / kChunk, width}, sum_options);
  const auto block_sums = at::empty({num_tokens / (kChunk * kChunk), width}, sum_options);

  with_float_type(task.grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_with_width(
        SegmentTask<T>{static_cast<const T*>(task.grad.const_data_ptr()), task.grad.stride(0),
                       as_uint32(groups.row), as_uint32(groups.position), as_uint32(offsets),
                       static_cast<Accumulator<T>*>(chunk_sums.mutable_data_ptr()),
                       static_cast<Accumulator<T>*>(block_sums.mutable_data_ptr()),
                       static_cast<T*>(task.out.mutable_data_ptr()), num_tokens, num_rows, width,
                       task.scale_grad_by_freq},
        stream);
  });
}

}  // namespace embed_ext::cuda
