// Dense gradient of few tokens, where the launches of a sort would take longer than the sums: each
// token looks for its row among all others. The first token of a row adds up the others, in their
// order, and writes the row; so the result is the same on every run, and rounded once.
//
//   row of token   4  9  4  4  1
//   token 0        first of row 4: g0 + g2 + g3
//   token 1        first of row 9: g1
//   tokens 2, 3    not the first: nothing to do
//   token 4        first of row 1: g4
#include <c10/cuda/CUDAException.h>

#include "dense_backward.cuh"
#include "dense_backward_policy.h"
#include "dispatch.cuh"
#include "launch_math.h"
#include "segment_sums.cuh"
#include "vector.cuh"

namespace embed_ext::cuda {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int64_t kNoRow = -1;

// In: the type of the gradient, Out: of the table, the same or float.
template <class In, class Out, class Index>
struct FewTask {
  using Acc = Accumulator<In>;

  const In* grad;       // [N, D]
  int64_t grad_stride;  // in elements
  const Index* indices;
  int num_indices;  // N <= kFewTokens
  int64_t padding_idx;
  Out* out;  // [V, D]
  int64_t out_stride;
  int64_t width;  // D
  bool add;       // to what out holds
  bool scale_grad_by_freq;
};

// row[i] = the row of token i, or kNoRow where it is not to count. All threads of the block.
template <class Index>
__device__ void read_rows(int64_t* row, const Index* indices, int num_indices, int64_t padding_idx,
                          const IndexErrors& errors) {
#pragma unroll 1  // report() is long
  for (int i = threadIdx.x; i < num_indices; i += kBlockThreads) {
    const auto index = static_cast<int64_t>(__ldg(indices + i));
    const bool good = errors.is_good(index);
    row[i] = good && index != padding_idx ? index : kNoRow;
    if (!good && blockIdx.x == 0) {
      errors.report(index, i);
    }
  }
  __syncthreads();
}

// Which of the 32 tokens from `first` on, and before `end`, name `row`. All lanes of the warp.
__device__ unsigned tokens_of(int64_t row, const int64_t* rows, int first, int end) {
  const int i = first + static_cast<int>(threadIdx.x) % kWarpSize;
  return __ballot_sync(kFullWarp, i < end && rows[i] == row);
}

// A warp owns (one token, one warp's width of columns), and leaves unless the token is the first of
// its row. A lane adds up one vector of kCount columns.
template <int kCount, class In, class Out, class Index>
__global__ void __launch_bounds__(kBlockThreads)
    sum_few(FewTask<In, Out, Index> task, Divider column_chunks, IndexErrors errors) {
  __shared__ int64_t rows[kFewTokens];
  read_rows(rows, task.indices, task.num_indices, task.padding_idx, errors);

  const int64_t item = int64_t{blockIdx.x} * kBlockWarps + threadIdx.x / kWarpSize;
  const int64_t chunk_of = column_chunks.quotient(item);
  if (chunk_of >= task.num_indices || rows[chunk_of] == kNoRow) {
    return;
  }
  const int token = static_cast<int>(chunk_of);
  const int64_t row = rows[token];
  for (int first = 0; first < token; first += kWarpSize) {
    if (tokens_of(row, rows, first, token) != 0) {
      return;
    }
  }
  const int64_t chunk = item - chunk_of * column_chunks.divisor();
  const int64_t column = (chunk * kWarpSize + threadIdx.x % kWarpSize) * kCount;
  const bool has_column = column < task.width;

  Sum<FewTask<In, Out, Index>, kCount> sum{};
  int count = 0;
  for (int first = token; first < task.num_indices; first += kWarpSize) {
    unsigned found = tokens_of(row, rows, first, task.num_indices);
    count += __popc(found);
    while (found != 0) {
      const In* source[kRowsInFlight];
      const int left = __popc(found);
#pragma unroll
      for (int u = 0; u < kRowsInFlight; ++u) {
        // Past the end, the last token once more: the loads need no branch, only the additions do.
        const int64_t next = first + __ffs(found) - 1;
        source[u] = task.grad + next * task.grad_stride + (has_column ? column : 0);
        found = u + 1 < left ? found & (found - 1) : found;
      }
      found = left > kRowsInFlight ? found : 0;
      Packed<In, kCount> value[kRowsInFlight];
#pragma unroll
      for (int u = 0; u < kRowsInFlight; ++u) {
        value[u] = load<In, kCount>(source[u]);
      }
#pragma unroll
      for (int u = 0; u < kRowsInFlight; ++u) {
        if (u < left) {
          add(sum, value[u]);
        }
      }
    }
  }
  if (has_column) {
    write_row<kCount>(task, row, column, count, sum);
  }
}

template <int kCount, class In, class Out, class Index>
void launch_few(const FewTask<In, Out, Index>& task, const IndexErrors& errors,
                cudaStream_t stream) {
  const int64_t column_chunks = ceil_div(task.width / kCount, kWarpSize);
  sum_few<kCount>
      <<<grid_blocks(task.num_indices * column_chunks, kBlockWarps), kBlockThreads, 0, stream>>>(
          task, Divider(column_chunks), errors);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class In, class Out, class Index>
void sum_with_index(const DenseBackwardTask& task, const Index* indices, const IndexErrors& errors,
                    cudaStream_t stream) {
  const FewTask<In, Out, Index> few{static_cast<const In*>(task.grad.const_data_ptr()),
                                    task.grad.stride(0),
                                    indices,
                                    static_cast<int>(task.indices.numel()),
                                    task.padding_idx,
                                    static_cast<Out*>(task.out.mutable_data_ptr()),
                                    task.out.stride(0),
                                    task.grad.size(1),
                                    task.rows == RowsOfOut::kAdded,
                                    task.scale_grad_by_freq};
  constexpr int kMost = kMaxVectorBytes / static_cast<int>(std::max(sizeof(In), sizeof(Out)));
  const int elements = vector_elements({sizeof(In), address(few.grad), few.grad_stride},
                                       {sizeof(Out), address(few.out), few.out_stride}, few.width);
  if (elements >= kMost) {
    launch_few<kMost>(few, errors, stream);
  } else if (elements >= 2) {
    launch_few<2>(few, errors, stream);
  } else {
    launch_few<1>(few, errors, stream);
  }
}

}  // namespace

void add_few(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream) {
  if (task.rows == RowsOfOut::kAllWritten) {
    C10_CUDA_CHECK(cudaMemsetAsync(task.out.mutable_data_ptr(), 0, task.out.nbytes(), stream));
  }
  const auto type = task.indices.scalar_type();
  const bool wide = type == at::kLong || type == at::kUInt32;
  const auto indices = task.indices.to(wide ? at::kLong : at::kInt);  // as in add_atomically()
  with_gradient_types(task.grad.scalar_type(), task.out.scalar_type(), [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    wide ? sum_with_index<In, Out>(task, indices.const_data_ptr<int64_t>(), errors, stream)
         : sum_with_index<In, Out>(task, indices.const_data_ptr<int32_t>(), errors, stream);
  });
}

}  // namespace embed_ext::cuda
