// Sparse gradient on CUDA, padding left out: one COO entry a token, in token order; or, coalesced,
// one a row in use, by the kernels that make a dense gradient.
//
//   sorted rows   2 2 5 6      V = 6: the last token is bad or ignored
//   place         0 0 1 2  2   of the row among those in use: what the kernels take for the row
//   entries       2 5
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "dense_backward.cuh"
#include "dispatch.cuh"
#include "gather_rows.cuh"
#include "group_by_row.cuh"
#include "index_check.cuh"
#include "launch_math.h"
#include "uninitialized.h"

namespace embed_ext::cuda {
namespace {

constexpr const char* kOp = "embedding_sparse_backward";

// A thread an entry. An entry with a bad index stays, as its number is already settled, but adds
// nothing: it names row 0, and its source -1 makes the gather write zeros.
template <class Index>
__global__ void __launch_bounds__(kBlockThreads)
    make_entries(const Index* indices, const int64_t* token, int64_t num_entries, int64_t* row,
                 int64_t* source, IndexErrors errors) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (i >= num_entries) {
    return;
  }
  const int64_t position = token == nullptr ? i : token[i];
  const auto index = static_cast<int64_t>(indices[position]);
  const bool good = errors.is_good(index);
  row[i] = good ? index : 0;
  source[i] = good ? position : -1;
  if (!good) {
    errors.report(index, position);
  }
}

// grad [N, D], source [nnz] -> [nnz, D]. Always a copy: a gradient that shared memory with
// grad_output would change when that is next written to, and could not leave a bad index out.
at::Tensor gather_values(const at::Tensor& grad, const at::Tensor& source, cudaStream_t stream) {
  const int64_t width = grad.size(1);
  auto values = uninitialized({source.numel(), width}, grad.options());
  if (values.numel() > 0) {
    const IndexErrors unreported{nullptr, kOp, grad.size(0)};
    launch_gather_rows(
        GatherTask<int64_t>{grad.const_data_ptr(), grad.stride(0), width == 1 ? 1 : grad.stride(1),
                            source.const_data_ptr<int64_t>(), values.mutable_data_ptr(),
                            source.numel(), width, static_cast<int64_t>(grad.element_size())},
        unreported, stream);
  }
  return values;
}

// values [nnz, D], index [nnz]: value i is divided by how often index[i] occurs.
void divide_by_frequency(at::Tensor& values, const at::Tensor& index) {
  const auto [unique, inverse, counts] =
      at::_unique2(index, /*sorted=*/true, /*return_inverse=*/true, /*return_counts=*/true);
  const auto type = c10::toRealValueType(at::toOpMathType(values.scalar_type()));
  values.div_(counts.index_select(0, inverse).unsqueeze(1).to(type));
}

struct Task {
  const at::Tensor& grad;   // [N, D]
  const at::Tensor& index;  // [N] contiguous
  int64_t num_weights;
  int64_t padding_idx;
  bool scale_grad_by_freq;
};

struct Entries {
  at::Tensor rows;    // [1, nnz] int64
  at::Tensor values;  // [nnz, D]
};

// An entry a token.
Entries copy_entries(const Task& task, const IndexErrors& errors, cudaStream_t stream) {
  const auto& index = task.index;
  at::Tensor token;  // undefined: all of them
  // A padding_idx beyond the table would hide bad indices.
  if (task.padding_idx >= 0 && task.padding_idx < task.num_weights && index.numel() > 0) {
    token = positions_except(index, task.padding_idx, kOp, stream);
  }
  const int64_t num_entries = token.defined() ? token.numel() : index.numel();
  const auto options = index.options().dtype(at::kLong);
  const auto row = uninitialized({1, num_entries}, options);
  const auto source = uninitialized({num_entries}, options);
  if (num_entries > 0) {
    with_index_pointer(index, [&](const auto* indices) {
      make_entries<<<grid_blocks(num_entries, kBlockThreads), kBlockThreads, 0, stream>>>(
          indices, token.defined() ? token.const_data_ptr<int64_t>() : nullptr, num_entries,
          row.mutable_data_ptr<int64_t>(), source.mutable_data_ptr<int64_t>(), errors);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  auto values = gather_values(task.grad, source, stream);
  if (task.scale_grad_by_freq) {
    const auto all = index.to(at::kLong);
    divide_by_frequency(values, token.defined() ? all.index_select(0, token) : all);
  }
  return {row, values};
}

// An entry a row in use, ascending. The host waits once, for their number.
Entries sum_entries(const Task& task, const IndexErrors& errors, cudaStream_t stream) {
  const int64_t width = task.grad.size(1);
  if (task.grad.is_complex()) {  // a sum of complex rows is a sum of real rows twice as wide
    const auto real = at::view_as_real(task.grad).flatten(-2);
    const auto [rows, values] =
        sum_entries({real, task.index, task.num_weights, task.padding_idx, task.scale_grad_by_freq},
                    errors, stream);
    return {rows, at::view_as_complex(values.view({values.size(0), width, 2}))};
  }
  if (task.index.numel() == 0) {
    return {at::empty({1, 0}, task.index.options().dtype(at::kLong)),
            at::empty({0, width}, task.grad.options())};
  }
  auto groups = group_by_row(task.index, task.padding_idx, errors, stream);
  const auto sorted_row = groups.row;
  const auto place = places_of(sorted_row, errors, stream);
  const int64_t used = place.select(0, task.index.numel()).item<int>();
  const auto rows = uninitialized({1, used}, task.index.options().dtype(at::kLong));
  const auto values = uninitialized({used, width}, task.grad.options());
  if (used > 0) {
    groups.row = place;
    add_segments({as_rows(task.grad, task.index.numel()), task.index, values,
                  RowsOfOut::kUsedWritten, task.padding_idx, task.scale_grad_by_freq},
                 groups, {nullptr, rows.mutable_data_ptr<int64_t>(), as_uint32(sorted_row)},
                 stream);
  }
  return {rows, values};
}

// grad_output [..., D], indices [...] -> sparse [num_weights, D]
at::Tensor embedding_sparse_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                     int64_t num_weights, int64_t padding_idx,
                                     bool scale_grad_by_freq, bool coalesced) {
  check_grad(kOp, grad_output, indices, num_weights);
  const c10::cuda::CUDAGuard device_guard(grad_output.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto errors = open_index_check(kOp, indices, num_weights);
  const auto index = indices.contiguous().view(-1);
  const int64_t width = grad_output.size(-1);
  const auto grad = grad_output.reshape({index.numel(), width});
  const Task task{grad, index, num_weights, padding_idx, scale_grad_by_freq};
  const auto [rows, values] =
      coalesced ? sum_entries(task, errors, stream) : copy_entries(task, errors, stream);
  close_index_check(indices, stream);
  return at::_sparse_coo_tensor_unsafe(rows, values, {num_weights, width},
                                       values.options().layout(at::kSparse),
                                       coalesced ? std::optional(true) : std::nullopt);
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding_sparse_backward", TORCH_FN(embed_ext::cuda::embedding_sparse_backward));
}
