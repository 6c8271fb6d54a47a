#include "group_by_row.cuh"

#include <c10/cuda/CUDAException.h>

#include <cub/device/device_radix_sort.cuh>
#include <limits>

#include "dispatch.cuh"
#include "launch_math.h"
#include "scratch.h"
#include "sorted_search.cuh"

namespace embed_ext::cuda {
namespace {

// A thread a token: its row, or V where the token is not to count, and its position.
template <class Index>
__global__ void __launch_bounds__(kBlockThreads)
    number_tokens(const Index* indices, int64_t num_indices, int64_t ignored_row, uint32_t* row,
                  uint32_t* position, IndexErrors errors) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (i >= num_indices) {
    return;
  }
  const auto index = static_cast<int64_t>(indices[i]);
  const bool good = errors.is_good(index);
  row[i] = static_cast<uint32_t>(good && index != ignored_row ? index : errors.num_rows);
  position[i] = static_cast<uint32_t>(i);
  if (!good) {
    errors.report(index, i);
  }
}

constexpr int kRowsPerThread = 16;
constexpr int kTileRows = kBlockThreads * kRowsPerThread;

// A block owns a tile of neighbouring entries of offset [V + 1]. Two threads find where the tile's
// tokens begin and end; every thread then searches its rows in between, mostly in very few tokens.
// A search, unlike marking where rows begin, costs no more where long stretches of rows are unused.
__global__ void __launch_bounds__(kBlockThreads)
    find_offsets(const uint32_t* row, int64_t num_tokens, uint32_t* offset, int64_t num_offsets) {
  __shared__ int64_t bound[2];
  const int64_t tile = int64_t{blockIdx.x} * kTileRows;
  if (threadIdx.x < 2) {
    bound[threadIdx.x] = lower_bound(row, 0, num_tokens, tile + threadIdx.x * kTileRows);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows && tile + i < num_offsets; i += kBlockThreads) {
    offset[tile + i] = static_cast<uint32_t>(lower_bound(row, bound[0], bound[1], tile + i));
  }
}

}  // namespace

RowGroups group_by_row(const at::Tensor& indices, int64_t ignored_row, const IndexErrors& errors,
                       cudaStream_t stream) {
  constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
  const int64_t num_tokens = indices.numel();
  TORCH_CHECK(num_tokens <= kMost && errors.num_rows <= kMost, errors.op,
              ": sorting indices on CUDA is limited to ", kMost,
              " rows and indices, but there are ", errors.num_rows, " rows and ", num_tokens,
              " indices");
  const auto options = indices.options().dtype(at::kInt);
  at::Tensor row[2], position[2];
  for (int i = 0; i < 2; ++i) {
    row[i] = scratch({num_tokens}, options);
    position[i] = scratch({num_tokens}, options);
  }
  with_index_pointer(indices, [&](const auto* index) {
    number_tokens<<<grid_blocks(num_tokens, kBlockThreads), kBlockThreads, 0, stream>>>(
        index, num_tokens, ignored_row, as_uint32(row[0]), as_uint32(position[0]), errors);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });

  cub::DoubleBuffer<uint32_t> rows(as_uint32(row[0]), as_uint32(row[1]));
  cub::DoubleBuffer<uint32_t> positions(as_uint32(position[0]), as_uint32(position[1]));
  const int end_bit = bit_width(static_cast<uint64_t>(errors.num_rows));  // V itself is a row here
  const auto sort = [&](void* workspace, size_t& bytes) {
    C10_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(
        workspace, bytes, rows, positions, static_cast<uint32_t>(num_tokens), 0, end_bit, stream));
  };
  size_t bytes = 0;
  sort(nullptr, bytes);
  // Never empty: with a null workspace CUB would only tell its size once more.
  const auto workspace = scratch({static_cast<int64_t>(bytes) + 1}, options.dtype(at::kByte));
  sort(workspace.mutable_data_ptr(), bytes);
  return {row[rows.selector], position[positions.selector]};
}

at::Tensor row_offsets(const RowGroups& groups, int64_t num_rows, cudaStream_t stream) {
  const auto offsets = scratch({num_rows + 1}, groups.row.options());
  find_offsets<<<grid_blocks(num_rows + 1, kTileRows), kBlockThreads, 0, stream>>>(
      as_uint32(groups.row), groups.row.numel(), as_uint32(offsets), num_rows + 1);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return offsets;
}

}  // namespace embed_ext::cuda
