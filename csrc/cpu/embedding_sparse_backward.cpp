// Sparse gradient on the CPU, padding left out: one COO entry a token, in token order; or,
// coalesced, one a row in use, by the sums that make a dense gradient.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "dense_gradient.h"
#include "group_by_row.h"
#include "indices.h"
#include "recycled_memory.h"
#include "row_kernels.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_sparse_backward";

// values [nnz, D], rows [nnz]: value i is divided by how often rows[i] occurs.
void divide_by_frequency(at::Tensor& values, const at::Tensor& rows, int64_t num_weights) {
  auto count = at::empty({rows.numel(), 1}, rows.options().dtype(at::kDouble));
  auto* per_token = count.mutable_data_ptr<double>();
  const RowGroups<WideToken> groups(rows.const_data_ptr<int64_t>(), rows.numel(), num_weights,
                                    /*padding_idx=*/-1);
  for (int64_t group = 0; group < groups.size(); ++group) {
    const int64_t begin = groups.begin(group), end = groups.end(group);
    for (int64_t i = begin; i < end; ++i) {
      per_token[groups.tokens()[i].position] = static_cast<double>(end - begin);
    }
  }
  values.div_(count.to(c10::toRealValueType(at::toOpMathType(values.scalar_type()))));
}

struct Entries {
  at::Tensor rows;    // [1, nnz] int64
  at::Tensor values;  // [nnz, D]
};

// An entry a row in use, ascending.
Entries sum_entries(const DenseGradient& task) {
  if (task.grad_output.is_complex()) {  // a sum of complex rows is a sum of real rows twice as wide
    const auto real = at::view_as_real(task.grad_output).flatten(-2);
    const auto [rows, values] = sum_entries(
        {real, task.indices, task.num_weights, task.padding_idx, task.scale_grad_by_freq});
    const int64_t width = task.grad_output.size(-1);
    return {rows, at::view_as_complex(values.view({values.size(0), width, 2}))};
  }
  at::Tensor rows;
  const auto values = sum_gradient(
      kOp, task, Sums::kPacked, task.grad_output.scalar_type(), [&](std::vector<int64_t>& used) {
        const auto count = static_cast<int64_t>(used.size());
        rows = at::empty({1, count}, task.indices.options().dtype(at::kLong));
        std::copy(used.begin(), used.end(), rows.mutable_data_ptr<int64_t>());
        return empty_output({count, task.grad_output.size(-1)}, task.grad_output.options());
      });
  return {rows, values};
}

// An entry a token. Copies: a gradient that shared memory with grad_output or with the caller's
// indices would change when either is next written to.
Entries copy_entries(const DenseGradient& task) {
  const int64_t count = task.indices.numel();
  const auto index_tensor = kernel_indices(task.indices);
  with_index_pointer(index_tensor, [&](const auto* index) {
    check_index_range(kOp, index, count, task.indices.sizes(), task.num_weights);
  });
  auto rows = index_tensor.reshape({-1}).to(at::kLong, /*non_blocking=*/false, /*copy=*/true);
  auto values = task.grad_output.reshape({count, task.grad_output.size(-1)});
  if (task.padding_idx >= 0) {
    const auto kept = (rows != task.padding_idx).nonzero().squeeze(1);
    rows = rows.index_select(0, kept);
    auto others = empty_output({kept.numel(), values.size(1)}, values.options());
    values = at::index_select_out(others, values, 0, kept);
  } else {
    values = empty_output(values.sizes(), values.options()).copy_(values);
  }
  if (task.scale_grad_by_freq) {
    divide_by_frequency(values, rows, task.num_weights);
  }
  return {rows.unsqueeze(0), values};
}

// grad_output [..., D], indices [...] -> sparse [num_weights, D]
at::Tensor embedding_sparse_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                     int64_t num_weights, int64_t padding_idx,
                                     bool scale_grad_by_freq, bool coalesced) {
  check_grad(kOp, grad_output, indices, num_weights);
  const DenseGradient task{grad_output, indices, num_weights, padding_idx, scale_grad_by_freq};
  const auto [rows, values] = coalesced ? sum_entries(task) : copy_entries(task);
  return at::_sparse_coo_tensor_unsafe(rows, values, {num_weights, grad_output.size(-1)},
                                       values.options().layout(at::kSparse),
                                       coalesced ? std::optional(true) : std::nullopt);
}

}  // namespace
}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) {
  m.impl("embedding_sparse_backward", TORCH_FN(embed_ext::cpu::embedding_sparse_backward));
}
