// Three kernels that copy rows: for short rows, for long rows, and for rows that are not in one
// piece. Which one and how wide its loads are is decided at the foot.
#include "gather_rows.cuh"

#include <c10/cuda/CUDAException.h>

#include "launch_math.h"
#include "vector.cuh"

namespace embed_ext::cuda {
namespace {

// Loads that a thread has under way at once. The loop that issues them contains nothing else: a
// branch or a store between two loads would make the second wait.
constexpr int kInFlight = 4;

constexpr int kChunkVectors = kWarpSize * kInFlight;

// A task in units of the vectors that its kernel moves. A row is `vectors` vectors long.
template <class Vector, class Index>
struct VectorTask {
  const Vector* table;
  int64_t row_stride;
  const Index* indices;
  Vector* out;
  int64_t num_indices;
  int64_t vectors;
};

// Memory is moved in sectors of 32 bytes.
template <class Vector>
constexpr int kSectorVectors = 32 / static_cast<int>(sizeof(Vector));

// Rows up to kChunkVectors vectors. A block owns a tile of whole neighbouring output rows, and a
// thread four vectors of it, a block's width apart: stores are contiguous across the tile whatever
// the row length, and no lane idles in a row that is not a power of two long. The first threads may
// be left without, so that a warp's stores begin where a sector does.
template <int kThreads, class Vector, class Index>
__global__ void __launch_bounds__(kThreads)
    gather_short_rows(VectorTask<Vector, Index> task, RowTile tile, IndexErrors errors) {
  const int row_vectors = tile.vectors_per_row();
  const int64_t first = int64_t{blockIdx.x} * tile.rows();
  const int rows = static_cast<int>(min(int64_t{tile.rows()}, task.num_indices - first));
  const int tile_vectors = rows * row_vectors;
  const Index* indices = task.indices + first;
  Vector* out = task.out + first * row_vectors;

  const int skipped = static_cast<int>(first * row_vectors % kSectorVectors<Vector>);
  const int first_vector = static_cast<int>(threadIdx.x) - skipped;

  const Vector* source[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    // Beyond the tile, its last vector: the loads need no branch, only the stores do.
    const int vector = max(min(first_vector + u * kThreads, tile_vectors - 1), 0);
    const int row = tile.row_of(vector);
    const auto index = static_cast<int64_t>(__ldg(indices + row));
    const int column = vector - row * row_vectors;
    source[u] = errors.is_good(index) ? task.table + index * task.row_stride + column : nullptr;
  }
  Vector value[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    value[u] = source[u] == nullptr ? Vector{} : __ldg(source[u]);
  }
  bool any_bad = false;
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int vector = first_vector + u * kThreads;
    if (vector >= 0 && vector < tile_vectors) {
      out[vector] = value[u];
    }
    any_bad |= source[u] == nullptr;
  }
  // Out of the way of the loads: whoever met a bad index looks for the first of the tile.
  for (int row = 0; any_bad && row < rows; ++row) {
    const auto index = static_cast<int64_t>(indices[row]);
    if (!errors.is_good(index)) {
      errors.report(index, first + row);
      break;
    }
  }
}

// Longer rows. A warp owns one chunk of kChunkVectors vectors of one output row, so that a single
// long row already keeps several warps busy; a lane moves four vectors, a warp's width apart.
template <class Vector, class Index>
__global__ void __launch_bounds__(kBlockThreads)
    gather_long_rows(VectorTask<Vector, Index> task, Divider row_chunks, IndexErrors errors) {
  const int64_t item = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarpSize;
  const int64_t position = row_chunks.quotient(item);
  if (position >= task.num_indices) {
    return;
  }
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = (item - position * row_chunks.divisor()) * kChunkVectors;
  const int vectors = static_cast<int>(min(int64_t{kChunkVectors}, task.vectors - first));
  const auto index = static_cast<int64_t>(__ldg(task.indices + position));
  Vector* out = task.out + position * task.vectors + first;
  Vector value[kInFlight] = {};
  if (errors.is_good(index)) {
    const Vector* source = task.table + index * task.row_stride + first;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      value[u] = __ldg(source + min(lane + u * kWarpSize, vectors - 1));
    }
  } else if (first == 0 && lane == 0) {
    errors.report(index, position);
  }
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int vector = lane + u * kWarpSize;
    if (vector < vectors) {
      out[vector] = value[u];
    }
  }
}

// Rows whose elements do not lie side by side (a transposed table): a thread an element, so that
// the table itself is never copied.
template <class Element, class Index>
__global__ void __launch_bounds__(kBlockThreads)
    gather_elements(VectorTask<Element, Index> task, int64_t column_stride, Divider width,
                    IndexErrors errors) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  const int64_t position = width.quotient(i);
  if (position >= task.num_indices) {
    return;
  }
  const int64_t column = i - position * width.divisor();
  const auto index = static_cast<int64_t>(__ldg(task.indices + position));
  const bool good = errors.is_good(index);
  task.out[i] =
      good ? __ldg(task.table + index * task.row_stride + column * column_stride) : Element{};
  if (!good && column == 0) {
    errors.report(index, position);
  }
}

template <class Vector, class Index>
void launch_short_rows(const VectorTask<Vector, Index>& task, const IndexErrors& errors,
                       cudaStream_t stream) {
  const int spare = task.vectors % kSectorVectors<Vector> == 0 ? 0 : kSectorVectors<Vector> - 1;
  const auto cut = gather_cut(static_cast<int>(task.vectors), spare, task.num_indices);
  const auto blocks = grid_blocks(task.num_indices, cut.tile.rows());
  if (cut.threads == kWarpSize) {
    gather_short_rows<kWarpSize><<<blocks, kWarpSize, 0, stream>>>(task, cut.tile, errors);
  } else {
    gather_short_rows<kBlockThreads><<<blocks, kBlockThreads, 0, stream>>>(task, cut.tile, errors);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Vector, class Index>
void launch_with_vector(const GatherTask<Index>& task, const IndexErrors& errors,
                        cudaStream_t stream) {
  const auto to_vectors = [&](int64_t elements) {
    return elements * task.element_bytes / static_cast<int64_t>(sizeof(Vector));
  };
  const VectorTask<Vector, Index> vector_task{static_cast<const Vector*>(task.table),
                                              to_vectors(task.row_stride),
                                              task.indices,
                                              static_cast<Vector*>(task.out),
                                              task.num_indices,
                                              to_vectors(task.width)};
  if (task.column_stride == 1 && vector_task.vectors <= kChunkVectors) {
    return launch_short_rows(vector_task, errors, stream);
  }
  if (task.column_stride != 1) {
    const auto blocks = grid_blocks(task.num_indices * task.width, kBlockThreads);
    gather_elements<<<blocks, kBlockThreads, 0, stream>>>(vector_task, task.column_stride,
                                                          Divider(task.width), errors);
  } else {
    const Divider chunks(ceil_div(vector_task.vectors, kChunkVectors));
    const auto blocks = grid_blocks(task.num_indices * chunks.divisor(), kBlockWarps);
    gather_long_rows<<<blocks, kBlockThreads, 0, stream>>>(vector_task, chunks, errors);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The widest that divides every row; an element where its neighbours are elsewhere.
template <class Index>
int vector_bytes_of(const GatherTask<Index>& task) {
  const auto bytes = static_cast<uint64_t>(task.element_bytes);
  if (task.column_stride != 1) {
    return static_cast<int>(bytes);
  }
  return vector_bytes(
      {address(task.table), address(task.out), bytes * task.width, bytes * task.row_stride});
}

}  // namespace

template <class Index>
void launch_gather_rows(const GatherTask<Index>& task, const IndexErrors& errors,
                        cudaStream_t stream) {
  if (task.num_indices == 0) {
    return;
  }
  switch (vector_bytes_of(task)) {
    case 1:
      return launch_with_vector<RawVector<1>::type>(task, errors, stream);
    case 2:
      return launch_with_vector<RawVector<2>::type>(task, errors, stream);
    case 4:
      return launch_with_vector<RawVector<4>::type>(task, errors, stream);
    case 8:
      return launch_with_vector<RawVector<8>::type>(task, errors, stream);
    default:
      return launch_with_vector<RawVector<16>::type>(task, errors, stream);
  }
}

#define EMBED_EXT_INSTANTIATE(Index)                                                    \
  template void launch_gather_rows<Index>(const GatherTask<Index>&, const IndexErrors&, \
                                          cudaStream_t)
EMBED_EXT_INSTANTIATE(int64_t);
EMBED_EXT_INSTANTIATE(int32_t);
EMBED_EXT_INSTANTIATE(int16_t);
EMBED_EXT_INSTANTIATE(int8_t);
EMBED_EXT_INSTANTIATE(uint8_t);
EMBED_EXT_INSTANTIATE(uint16_t);
EMBED_EXT_INSTANTIATE(uint32_t);
#undef EMBED_EXT_INSTANTIATE

}  // namespace embed_ext::cuda
