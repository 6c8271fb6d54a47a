// Sparse gradient on the CPU: one COO entry a token, in token order, padding left out.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "group_by_row.h"
#include "indices.h"
#include "row_kernels.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_sparse_backward";

// values [nnz, D], rows [nnz]: value i is divided by how often rows[i] occurs.
void divide_by_frequency(at::Tensor& values, const at::Tensor& rows, int64_t num_weights) {
  auto count = at::empty({rows.numel(), 1}, rows.options().dtype(at::kDouble));
  auto* per_token = count.mutable_data_ptr<double>();
  const auto tokens = group_by_row<WideToken>(rows.const_data_ptr<int64_t>(), rows.numel(),
                                              num_weights, /*padding_idx=*/-1);
  for_each_run(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      per_token[tokens[i].position] = static_cast<double>(end - begin);
    }
  });
  values.div_(count.to(c10::toRealValueType(at::toOpMathType(values.scalar_type()))));
}

// grad_output [..., D], indices [...] -> sparse [num_weights, D]
at::Tensor embedding_sparse_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                     int64_t num_weights, int64_t padding_idx,
                                     bool scale_grad_by_freq) {
  check_grad(kOp, grad_output, indices, num_weights);
  const int64_t width = grad_output.size(-1);
  const auto index_tensor = kernel_indices(indices);
  with_index_pointer(index_tensor, [&](const auto* index) {
    check_index_range(kOp, index, indices.numel(), indices.sizes(), num_weights);
  });
  // Copies: a gradient that shared memory with grad_output or with the caller's indices would
  // change when either is next written to.
  auto rows = index_tensor.reshape({-1}).to(at::kLong, /*non_blocking=*/false, /*copy=*/true);
  auto values = grad_output.reshape({indices.numel(), width});
  if (padding_idx >= 0) {
    const auto kept = (rows != padding_idx).nonzero().squeeze(1);
    rows = rows.index_select(0, kept);
    values = values.index_select(0, kept);
  } else {
    values = values.clone(at::MemoryFormat::Contiguous);
  }
  if (scale_grad_by_freq) {
    divide_by_frequency(values, rows, num_weights);
  }
  return at::_sparse_coo_tensor_unsafe(rows.unsqueeze(0), values, {num_weights, width},
                                       values.options().layout(at::kSparse));
}

}  // namespace
}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) {
  m.impl("embedding_sparse_backward", TORCH_FN(embed_ext::cpu::embedding_sparse_backward));
}
