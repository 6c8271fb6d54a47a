// Two ways to sort: few tokens by one block, more by CUB's device-wide sort. And what else is
// CUB's: the places of sorted rows by its scan, the tokens that are not padding by its selection.
#include "group_by_row.cuh"

#include <c10/cuda/CUDAException.h>

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
#include <algorithm>
#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_select.cuh>
#include <limits>

#include "dispatch.cuh"
#include "launch_math.h"
#include "uninitialized.h"
#include "vector.cuh"

namespace embed_ext::cuda {
namespace {

constexpr int kKeysPerThread = 8;

// Up to here one block sorts in shared memory: quicker than the launches of a sort by many. An
// estimate that has not been measured on a GPU.
constexpr int kFewTokens = kBlockThreads * kKeysPerThread;

// indices [N] -> row [N], position [N], and zeros in `cleared` [16 * cleared_vectors]
template <class Index>
struct GroupTask {
  const Index* indices;
  int64_t num_indices;
  int64_t ignored_row;
  uint32_t* row;
  uint32_t* position;
  uint4* cleared;
  int64_t cleared_vectors;

  // The row of token i, or V where it is not to count.
  __device__ uint32_t row_of(int64_t i, const IndexErrors& errors) const {
    const auto index = static_cast<int64_t>(__ldg(indices + i));
    const bool good = errors.is_good(index);
    if (!good) {
      errors.report(index, i);
    }
    return static_cast<uint32_t>(good && index != ignored_row ? index : errors.num_rows);
  }

  __device__ void clear(int64_t vector) const {
    if (vector < cleared_vectors) {
      store_raw(cleared + vector, uint4{});
    }
  }
};

// A thread a token, for the sort that follows, and a vector to clear.
template <class Index>
__global__ void __launch_bounds__(kBlockThreads)
    number_tokens(GroupTask<Index> task, IndexErrors errors) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  task.clear(i);
  if (i < task.num_indices) {
    task.row[i] = task.row_of(i, errors);
    task.position[i] = static_cast<uint32_t>(i);
  }
}

// The first block sorts, the others clear.
template <class Index>
__global__ void __launch_bounds__(kBlockThreads)
    sort_few(GroupTask<Index> task, int end_bit, IndexErrors errors) {
  using Sort = cub::BlockRadixSort<uint32_t, kBlockThreads, kKeysPerThread, uint32_t>;
  using Storage = typename Sort::TempStorage;
  __shared__ Storage storage;
  __shared__ uint32_t unsorted[kFewTokens];
  if (blockIdx.x > 0) {
    return task.clear(int64_t{blockIdx.x - 1} * kBlockThreads + threadIdx.x);
  }
  const auto num_indices = static_cast<int>(task.num_indices);
#pragma unroll 1  // report() is long
  for (int i = threadIdx.x; i < kFewTokens; i += kBlockThreads) {
    // Beyond the last token, rows that none is behind: the sort is stable.
    unsorted[i] = i < num_indices ? task.row_of(i, errors) : std::numeric_limits<uint32_t>::max();
  }
  __syncthreads();
  uint32_t row[kKeysPerThread], position[kKeysPerThread];
#pragma unroll
  for (int u = 0; u < kKeysPerThread; ++u) {
    position[u] = threadIdx.x * kKeysPerThread + u;
    row[u] = unsorted[position[u]];
  }
  Sort(storage).SortBlockedToStriped(row, position, 0, end_bit);
#pragma unroll
  for (int u = 0; u < kKeysPerThread; ++u) {
    const int i = threadIdx.x + u * kBlockThreads;
    if (i < num_indices) {
      task.row[i] = row[u];
      task.position[i] = position[u];
    }
  }
}

// f(workspace, bytes) is a call of CUB's, which with a null workspace says how many bytes it needs.
template <class F>
void with_workspace(const at::TensorOptions& options, const F& f) {
  size_t bytes = 0;
  f(nullptr, bytes);
  // Never empty: its address would be null, and CUB would only tell its size once more.
  const auto workspace = uninitialized({static_cast<int64_t>(bytes) + 1}, options.dtype(at::kByte));
  f(workspace.mutable_data_ptr(), bytes);
}

// The sort of rows[0], positions[0]; returns where it has left its result.
RowGroups sort_many(const at::Tensor (&row)[2], const at::Tensor (&position)[2], int end_bit,
                    cudaStream_t stream) {
  cub::DoubleBuffer<uint32_t> rows(as_uint32(row[0]), as_uint32(row[1]));
  cub::DoubleBuffer<uint32_t> positions(as_uint32(position[0]), as_uint32(position[1]));
  const auto num_tokens = static_cast<uint32_t>(row[0].numel());
  with_workspace(row[0].options(), [&](void* workspace, size_t& bytes) {
    C10_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(workspace, bytes, rows, positions, num_tokens, 0,
                                                   end_bit, stream));
  });
  return {row[rows.selector], position[positions.selector]};
}

// Whose sums are the places: 1 where a row begins, the first row excepted; and, one beyond the last
// token, 1 if the last row is in use, so that the last place is the number of rows in use.
struct PlaceSteps {
  const uint32_t* row;
  int64_t num_tokens;
  int64_t num_rows;

  __host__ __device__ uint32_t operator()(int64_t i) const {
    if (i == num_tokens) {
      return row[i - 1] < num_rows;
    }
    return i > 0 && row[i] != row[i - 1];
  }
};

// Of indices of any type: a selection for each would be as many large kernels.
struct IsOtherRow {
  const void* indices;
  at::ScalarType type;
  int64_t ignored_row;

  __host__ __device__ bool operator()(int64_t position) const {
    return with_index_pointer(indices, type, [&](const auto* index) {
      return static_cast<int64_t>(index[position]) != ignored_row;
    });
  }
};

// In older versions of CUB the number of items is an int.
int as_num_items(int64_t num_items, const char* op, const char* gradient) {
  TORCH_CHECK(num_items <= std::numeric_limits<int>::max(), op, ": ", gradient,
              " on CUDA is limited to 2^31 - 2 indices, but there are more");
  return static_cast<int>(num_items);
}

}  // namespace

RowGroups group_by_row(const at::Tensor& indices, int64_t ignored_row, const IndexErrors& errors,
                       cudaStream_t stream, const at::Tensor& cleared) {
  constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
  const int64_t num_tokens = indices.numel();
  TORCH_CHECK(num_tokens <= kMost && errors.num_rows <= kMost, errors.op,
              ": sorting indices on CUDA is limited to ", kMost,
              " rows and indices, but there are ", errors.num_rows, " rows and ", num_tokens,
              " indices");
  const bool few = num_tokens <= kFewTokens;
  const int end_bit = bit_width(static_cast<uint64_t>(errors.num_rows));  // V itself is a row here
  const auto options = indices.options().dtype(at::kInt);
  at::Tensor row[2], position[2];
  for (int i = 0; i < (few ? 1 : 2); ++i) {
    row[i] = uninitialized({num_tokens}, options);
    position[i] = uninitialized({num_tokens}, options);
  }
  const int64_t to_clear = cleared.defined() ? cleared.numel() / kMaxVectorBytes : 0;
  with_index_pointer(indices, [&](const auto* index) {
    using Index = std::decay_t<decltype(*index)>;
    const GroupTask<Index> task{
        index,
        num_tokens,
        ignored_row,
        as_uint32(row[0]),
        as_uint32(position[0]),
        to_clear > 0 ? static_cast<uint4*>(cleared.mutable_data_ptr()) : nullptr,
        to_clear};
    if (few) {
      const auto blocks = 1 + grid_blocks(to_clear, kBlockThreads);
      sort_few<<<blocks, kBlockThreads, 0, stream>>>(task, end_bit, errors);
    } else {
      const auto blocks = grid_blocks(std::max(num_tokens, to_clear), kBlockThreads);
      number_tokens<<<blocks, kBlockThreads, 0, stream>>>(task, errors);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return few ? RowGroups{row[0], position[0]} : sort_many(row, position, end_bit, stream);
}

at::Tensor places_of(const at::Tensor& row, const IndexErrors& errors, cudaStream_t stream) {
  const int num_items = as_num_items(row.numel() + 1, errors.op, "a coalesced gradient");
  const auto steps =
      thrust::make_transform_iterator(thrust::make_counting_iterator(int64_t{0}),
                                      PlaceSteps{as_uint32(row), row.numel(), errors.num_rows});
  const auto place = uninitialized({row.numel() + 1}, row.options());
  with_workspace(row.options(), [&](void* workspace, size_t& bytes) {
    C10_CUDA_CHECK(cub::DeviceScan::InclusiveSum(workspace, bytes, steps, as_uint32(place),
                                                 num_items, stream));
  });
  return place;
}

at::Tensor positions_except(const at::Tensor& indices, int64_t ignored_row, const char* op,
                            cudaStream_t stream) {
  const int64_t num_tokens = indices.numel();
  const int num_items = as_num_items(num_tokens, op, "a sparse gradient with a padding_idx");
  // Their number lies behind them.
  const auto positions = uninitialized({num_tokens + 1}, indices.options().dtype(at::kLong));
  auto* const position = positions.mutable_data_ptr<int64_t>();
  const IsOtherRow is_kept{indices.const_data_ptr(), indices.scalar_type(), ignored_row};
  with_workspace(positions.options(), [&](void* workspace, size_t& bytes) {
    C10_CUDA_CHECK(cub::DeviceSelect::If(workspace, bytes,
                                         thrust::make_counting_iterator(int64_t{0}), position,
                                         position + num_tokens, num_items, is_kept, stream));
  });
  return positions.narrow(0, 0, positions.select(0, num_tokens).item<int64_t>());
}

}  // namespace embed_ext::cuda
