// Dense gradient on the CPU: grad_weight[v] = sum of grad_output[i] over all i with indices[i] = v.
//
// Tokens are grouped by row (group_by_row.h); each row's sum is then written once, by one thread.
// A row used very often is cut into chunks of fixed length whose partial sums are added in a
// second pass, so that it does not hold up the other threads (row_runs.h). The result is the same
// for every number of threads.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "dense_gradient.h"
#include "group_by_row.h"
#include "indices.h"
#include "recycled_memory.h"
#include "sum_groups.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_dense_backward";

template <class In, class Out, class TokenT, class Index>
at::Tensor sum_by_row(const GradRows& rows, const Index* indices, const DenseGradient& task,
                      Sums sums, const TableOf& table_of) {
  const RowGroups<TokenT> groups(indices, rows.count, task.num_weights, task.padding_idx);
  auto used_rows = groups.rows();
  at::Tensor table = table_of(used_rows);
  if (rows.width == 0 || groups.size() == 0) {
    return table;
  }
  const auto element_bytes = static_cast<int64_t>(sizeof(Out));
  const int64_t row_bytes = rows.width * element_bytes;
  auto* const out = reinterpret_cast<char*>(table.mutable_data_ptr<Out>());
  const bool streamed =
      table.is_contiguous() && worth_streaming(out, table.size(0) * row_bytes, row_bytes);
  const Target target{out,
                      table.stride(0) * element_bytes,
                      sums == Sums::kPacked,
                      task.scale_grad_by_freq,
                      sums == Sums::kAdded,
                      streamed};
  sum_groups<In>(groups, rows, target, [](auto input, const SumTask<TokenT>& some) {
    sum_runs<decltype(input), Out>(some);
  });
  return table;
}

template <class In, class Out, class Index>
at::Tensor sum_by_row(const GradRows& rows, const Index* indices, const DenseGradient& task,
                      Sums sums, const TableOf& table_of) {
  if (fits_narrow_token(task.num_weights, rows.count)) {
    return sum_by_row<In, Out, Token>(rows, indices, task, sums, table_of);
  }
  return sum_by_row<In, Out, WideToken>(rows, indices, task, sums, table_of);
}

// rows [N, D] of a real dtype, index [N] in range
template <class Index>
at::Tensor dispatch_dtype(const GradRows& rows, const Index* index, const DenseGradient& task,
                          Sums sums, at::ScalarType table_type, const TableOf& table_of) {
  using c10::BFloat16, c10::Half;
  const auto type = rows.grad.scalar_type();
  TORCH_INTERNAL_ASSERT(table_type == type || table_type == at::kFloat);
  const bool widened = table_type != type;
  switch (type) {
    case at::kDouble:
      return sum_by_row<double, double>(rows, index, task, sums, table_of);
    case at::kBFloat16:
      return widened ? sum_by_row<BFloat16, float>(rows, index, task, sums, table_of)
                     : sum_by_row<BFloat16, BFloat16>(rows, index, task, sums, table_of);
    case at::kHalf:
      return widened ? sum_by_row<Half, float>(rows, index, task, sums, table_of)
                     : sum_by_row<Half, Half>(rows, index, task, sums, table_of);
    default:
      return sum_by_row<float, float>(rows, index, task, sums, table_of);
  }
}

// grad_output [..., D], indices [...] -> [num_weights, D]
at::Tensor embedding_dense_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                    int64_t num_weights, int64_t padding_idx,
                                    bool scale_grad_by_freq) {
  check_grad(kOp, grad_output, indices, num_weights);
  if (grad_output.is_complex()) {  // a sum of complex rows is a sum of real rows twice as wide
    const auto real = at::view_as_real(grad_output).flatten(-2);
    const auto out =
        cpu::embedding_dense_backward(real, indices, num_weights, padding_idx, scale_grad_by_freq);
    return at::view_as_complex(out.view({num_weights, grad_output.size(-1), 2}));
  }
  const DenseGradient task{grad_output, indices, num_weights, padding_idx, scale_grad_by_freq};
  return sum_gradient(kOp, task, Sums::kWritten, grad_output.scalar_type(),
                      [&](const std::vector<int64_t>& /*used_rows*/) {
                        return zero_rows(num_weights, grad_output.size(-1), grad_output.options());
                      });
}

}  // namespace

at::Tensor sum_gradient(const char* op, const DenseGradient& task, Sums sums,
                        at::ScalarType table_type, const TableOf& table_of) {
  check_grad(op, task.grad_output, task.indices, task.num_weights);
  const int64_t count = task.indices.numel();
  const int64_t width = task.grad_output.size(-1);
  // A contiguous gradient, the usual one, is its own [N, D] matrix: no view is made of it.
  auto grad = task.grad_output.is_contiguous() ? task.grad_output
                                               : task.grad_output.reshape({count, width});
  if (grad.stride(-1) != 1) {
    grad = grad.contiguous();
  }
  const auto index_tensor = kernel_indices(task.indices);
  return with_index_pointer(index_tensor, [&](const auto* index) {
    check_index_range(op, index, count, task.indices.sizes(), task.num_weights);
    const int64_t stride = grad.is_contiguous() ? width : grad.stride(0);
    return dispatch_dtype(GradRows{grad, count, width, stride}, index, task, sums, table_type,
                          table_of);
  });
}

}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) {
  m.impl("embedding_dense_backward", TORCH_FN(embed_ext::cpu::embedding_dense_backward));
}
