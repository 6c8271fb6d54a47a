// Dense gradient by atomic adds: out is filled with zeros, unless it is zero already or to be added
// to, then every token's row is added to it.
//
// Atomic adds to one address queue up, so that a row used often would hold up all. A warp therefore
// takes 32 tokens at a time, brings equal rows together, adds those in registers, and sends one
// atomic add a distinct row (of narrow rows, of which it sums several at once, sometimes two):
//
//   lane                 0  1  2  3  4  5  6  7      (8 of the 32 shown)
//   row of its token     4  9  4  4  1  9  4  7
//   lanes in row order   0  2  3  6  1  5  4  7      rows in the order of first use: 4 4 4 4 9 9 1
//   7 atomic adds          4: g0 + g2 + g3 + g6   9: g1 + g5   1: g4   7: g7
#include <c10/cuda/CUDAException.h>

#include "dense_backward.cuh"
#include "dispatch.cuh"
#include "lane_columns.cuh"
#include "launch_math.h"
#include "vector.cuh"

namespace embed_ext::cuda {
namespace {

constexpr int64_t kNoRow = -1;

// In: the type of the gradient, Out: of the sums, float or double.
template <class In, class Out, class Index>
struct ScatterTask {
  const In* grad;       // [N, D]
  int64_t grad_stride;  // in elements
  const Index* indices;
  int64_t num_indices;
  int64_t padding_idx;
  Out* out;  // [V, D]
  int64_t out_stride;
  int64_t width;  // of a row, in elements
};

// Reductions, spelled out, since the compiler makes of atomicAdd() an atomic that returns the old
// value even where nobody reads it.
__device__ void reduce(float* target, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(target)), "f"(value)
               : "memory");
}
__device__ void reduce(double* target, double value) {
  asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(target)), "d"(value)
               : "memory");
}

// Whether neighbouring values of the type are added by one instruction.
#if __CUDA_ARCH__ >= 900
template <class T>
constexpr bool kAddsVectors = std::is_same_v<T, float>;
#else
template <class T>
constexpr bool kAddsVectors = false;
#endif

// target[0..kCount) += value, which is one transaction.
template <class T, int kCount>
__device__ void atomic_add(T* target, const Packed<T, kCount>& value) {
  const T* v = value.values;
  if constexpr (kAddsVectors<T> && kCount == 4) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(target)), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
  } else if constexpr (kAddsVectors<T> && kCount == 2) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};"
                 :
                 : "l"(__cvta_generic_to_global(target)), "f"(v[0]), "f"(v[1])
                 : "memory");
  } else {
    static_assert(kCount == 1, "an instruction a value");
    reduce(target, v[0]);
  }
}

// The columns that a lane loads and adds: vectors only where these can be added as such. Else
// neighbouring lanes have neighbouring columns, and what a warp adds at once is one piece.
template <class Tag, class T>
using AddedColumns = std::conditional_t<kAddsVectors<T>, LaneColumns<Tag::kWidth, Tag::kVectors>,
                                        LaneColumns<1, Tag::kWidth * Tag::kVectors>>;

// The lane whose token comes this lane's number of places from the start, once tokens of equal rows
// stand together. All lanes of the warp take part. `order` is the warp's own 32 bytes.
__device__ int lane_in_row_order(int64_t row, int lane, uint8_t* order) {
  const unsigned peers = __match_any_sync(kFullWarp, static_cast<unsigned long long>(row));
  const int leader = __ffs(peers) - 1;
  const int own = lane == leader ? __popc(peers) : 0;
  int through = own;  // inclusive sum: tokens of all rows whose leaders come up to this lane
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int below = __shfl_up_sync(kFullWarp, through, distance);
    through += lane >= distance ? below : 0;
  }
  const int first = __shfl_sync(kFullWarp, through - own, leader);
  const int place = first + __popc(peers & ((1u << lane) - 1));
  order[place] = static_cast<uint8_t>(lane);
  __syncwarp();
  return order[lane];
}

// Each group of `lanes` lanes holds the sum of its last row. Where groups that follow each other
// hold one of the same row, adds those up in the first of them. All lanes of the warp take part.
// Returns whether this lane's group is the first.
template <class T, int kCount>
__device__ bool fold_groups(Packed<T, kCount>& sum, int64_t row, int lane, int lanes) {
  const bool begins = __shfl_up_sync(kFullWarp, row, lanes) != row || lane < lanes;
  const unsigned all_begins = __ballot_sync(kFullWarp, begins);
  if (all_begins == kFullWarp) {  // most often: no row is shared
    return begins;
  }
  const int group_start = lane & ~(lanes - 1);
  const int end = next_set_lane(all_begins, group_start + lanes);
  for (int distance = lanes; distance < kWarpSize; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const T other = __shfl_down_sync(kFullWarp, sum.values[i], distance);
      sum.values[i] += group_start + distance < end ? other : T{0};
    }
  }
  return begins;
}

// A warp owns (tile_tokens neighbouring tokens, at most 32; one chunk of the columns). Its lanes
// first read and order the indices. Then each group of `lanes` lanes walks `lanes` tokens of that
// order, a lane adding up its piece of the columns: a row of 64 bytes occupies 4 lanes, and 8
// groups work at once. What a row has in several groups is folded, all but what the last of them
// begins with: that gets an add of its own if another row follows in the group.
template <class Tag, class In, class Out, class Index>
__global__ void __launch_bounds__(kBlockThreads)
    scatter_add(ScatterTask<In, Out, Index> task, int tile_tokens, int lanes, Divider row_chunks,
                IndexErrors errors) {
  using Columns = AddedColumns<Tag, Out>;
  __shared__ uint8_t orders[kBlockWarps][kWarpSize];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int lane_in_group = lane & (lanes - 1);
  const int group_start = lane - lane_in_group;
  const int64_t item = int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + warp;
  const int64_t tile = row_chunks.quotient(item);
  if (tile >= ceil_div(task.num_indices, tile_tokens)) {
    return;
  }
  const int64_t chunk = item - tile * row_chunks.divisor();
  const int64_t first_token = tile * tile_tokens;
  const Columns columns(chunk, lanes, lane_in_group, task.width);

  int64_t row = kNoRow;
  if (lane < tile_tokens && first_token + lane < task.num_indices) {
    const auto index = static_cast<int64_t>(__ldg(task.indices + first_token + lane));
    if (!errors.is_good(index)) {
      if (chunk == 0) {
        errors.report(index, first_token + lane);
      }
    } else if (index != task.padding_idx) {
      row = index;
    }
  }
  const int ordered_lane = lane_in_row_order(row, lane, orders[warp]);
  const int64_t ordered_row = __shfl_sync(kFullWarp, row, ordered_lane);

  Packed<Out, Columns::kCount> sum{};
  int64_t sum_row = kNoRow;
  const auto flush = [&] {
    if (sum_row != kNoRow) {
      Out* const target = task.out + sum_row * task.out_stride;
      columns.for_each(
          [&](int v, int64_t column) { atomic_add(target + column, Columns::part(sum, v)); });
    }
  };
  for (int k = 0; k < lanes; k += kRowsInFlight) {
    int64_t token_row[kRowsInFlight];
    Packed<In, Columns::kCount> value[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const int from = group_start + min(k + u, lanes - 1);
      token_row[u] = __shfl_sync(kFullWarp, ordered_row, from);
      const int token = __shfl_sync(kFullWarp, ordered_lane, from);
      if (k + u >= lanes) {
        token_row[u] = kNoRow;
      }
      value[u] = columns.load_if(token_row[u] != kNoRow,
                                 task.grad + (first_token + token) * task.grad_stride);
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      if (k + u < lanes && token_row[u] != sum_row) {
        flush();
        sum_row = token_row[u];
        sum = {};
      }
      add(sum, value[u]);
    }
  }
  if (fold_groups(sum, sum_row, lane, lanes)) {
    flush();
  }
}

template <class Tag, class In, class Out, class Index>
void launch_scatter(const ScatterTask<In, Out, Index>& task, const RowLanes& share,
                    const IndexErrors& errors, cudaStream_t stream) {
  const auto cut = scatter_cut(task.num_indices, share.chunks);
  const int64_t items = ceil_div(task.num_indices, cut.tile_tokens) * share.chunks;
  scatter_add<Tag><<<grid_blocks(items, cut.threads / kWarpSize), cut.threads, 0, stream>>>(
      task, cut.tile_tokens, share.lanes, Divider(share.chunks), errors);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class In, class Out, class Index>
void scatter(const DenseBackwardTask& task, const Index* indices, const IndexErrors& errors,
             cudaStream_t stream) {
  const ScatterTask<In, Out, Index> raw{static_cast<const In*>(task.grad.const_data_ptr()),
                                        task.grad.stride(0),
                                        indices,
                                        task.indices.numel(),
                                        task.padding_idx,
                                        static_cast<Out*>(task.out.mutable_data_ptr()),
                                        task.out.stride(0),
                                        task.grad.size(1)};
  const auto elements = vector_elements({sizeof(In), address(raw.grad), raw.grad_stride},
                                        {sizeof(Out), address(raw.out), raw.out_stride}, raw.width);
  constexpr int kMost = kMaxVectorBytes / static_cast<int>(sizeof(Out));
  with_lane_columns<kMost>(elements, raw.width, [&](auto tag, const RowLanes& share) {
    launch_scatter<decltype(tag)>(raw, share, errors, stream);
  });
}

}  // namespace

void add_atomically(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream) {
  if (task.rows == RowsOfOut::kAllWritten) {
    C10_CUDA_CHECK(cudaMemsetAsync(task.out.mutable_data_ptr(), 0, task.out.nbytes(), stream));
  }
  // The narrow index types are widened once: they cost little beside the rows, and each kernel then
  // needs two index types, not seven.
  const auto type = task.indices.scalar_type();
  const bool wide = type == at::kLong || type == at::kUInt32;
  const auto indices = task.indices.to(wide ? at::kLong : at::kInt);
  with_gradient_types(task.grad.scalar_type(), task.out.scalar_type(), [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    if constexpr (std::is_same_v<Out, Accumulator<In>>) {
      wide ? scatter<In, Out>(task, indices.const_data_ptr<int64_t>(), errors, stream)
           : scatter<In, Out>(task, indices.const_data_ptr<int32_t>(), errors, stream);
    } else {
      TORCH_INTERNAL_ASSERT(false, "atomic adds to a table of low precision");
    }
  });
}

}  // namespace embed_ext::cuda
