// Dense gradient on the CPU: grad_weight[v] = sum of grad_output[i] over all i with indices[i] = v.
//
// Tokens are grouped by row (group_by_row.h); each row's sum is then written once, by one thread.
// A row used very often is cut into chunks of fixed length whose partial sums are added in a
// second pass, so that it does not hold up the other threads; since the cut depends on the batch
// alone, the result is the same for every number of threads.
//
//   row 7 used 2,500 times, chunk 1,024:   partial 0 | partial 1 | partial 2   ->   row 7
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "dense_gradient.h"
#include "group_by_row.h"
#include "indices.h"
#include "recycled_memory.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_dense_backward";

constexpr int64_t kChunk = 1024;  // tokens summed in one go

// Elements a thread should at least add before a second one pays for its start.
constexpr int64_t kGrainElements = 1 << 15;

// What is summed where. Runs of `direct` go straight to the table; those of `partial` to scratch
// rows, which `combine` adds up (its tokens' positions are scratch rows).
template <class TokenT>
struct Plan {
  std::vector<Run> direct, partial, combine;
  std::vector<TokenT> scratch_tokens;
};

// table [V, D], or [U, D] if packed, rows row_bytes apart. Partial runs get their scratch rows once
// these are allocated.
template <class TokenT>
Plan<TokenT> plan_runs(const std::vector<TokenT>& tokens, size_t used_rows, char* table,
                       int64_t row_bytes, bool packed, bool scale_grad_by_freq) {
  Plan<TokenT> plan;
  plan.direct.reserve(used_rows);
  using Id = decltype(TokenT::row);
  for_each_run(tokens, [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    const int64_t divisor = scale_grad_by_freq ? count : 1;
    const auto runs_before = static_cast<int64_t>(plan.direct.size() + plan.combine.size());
    const auto row = packed ? runs_before : static_cast<int64_t>(tokens[begin].row);
    void* out = table + row * row_bytes;
    if (count <= kChunk) {
      plan.direct.push_back({out, begin, count, divisor});
      return;
    }
    const auto first_scratch = static_cast<int64_t>(plan.scratch_tokens.size());
    for (int64_t at = begin; at < end; at += kChunk) {
      plan.scratch_tokens.push_back(
          {tokens[begin].row, static_cast<Id>(plan.scratch_tokens.size())});
      plan.partial.push_back({nullptr, at, std::min(kChunk, end - at), 1});
    }
    const auto chunks = static_cast<int64_t>(plan.scratch_tokens.size()) - first_scratch;
    plan.combine.push_back({out, first_scratch, chunks, divisor});
  });
  return plan;
}

// Splits the runs among threads by the tokens they hold, not by their number.
template <class In, class Out, class TokenT>
void sum_in_parallel(const std::vector<Run>& runs, const std::vector<TokenT>& tokens,
                     const void* rows, int64_t row_stride, int64_t width, bool add, bool streamed) {
  const auto first_run_from = [&](int64_t token) {
    return std::lower_bound(runs.begin(), runs.end(), token,
                            [](const Run& run, int64_t value) { return run.begin < value; }) -
           runs.begin();
  };
  const auto count = static_cast<int64_t>(tokens.size());
  const int64_t grain = std::max<int64_t>(1, kGrainElements / width);
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = first_run_from(begin);
    const int64_t last = first_run_from(end);
    sum_runs<In, Out>(SumTask<TokenT>{runs.data() + first, last - first, tokens.data(), rows,
                                      row_stride, width, add, streamed});
  });
}

// Gradient rows as the sums read them: N rows of D elements, `stride` elements apart.
struct GradRows {
  const at::Tensor& grad;  // [N, D] with unit inner stride, or [..., D] contiguous
  int64_t count;
  int64_t width;
  int64_t stride;
};

template <class In, class Out, class TokenT, class Index>
at::Tensor sum_by_row(const GradRows& rows, const Index* indices, const DenseGradient& task,
                      Sums sums, const TableOf& table_of) {
  using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const int64_t width = rows.width;
  const auto tokens = group_by_row<TokenT>(indices, rows.count, task.num_weights, task.padding_idx);
  std::vector<int64_t> used_rows;
  for_each_run(tokens, [&](int64_t begin, int64_t) { used_rows.push_back(tokens[begin].row); });
  const size_t used = used_rows.size();
  at::Tensor table = table_of(used_rows);
  if (width == 0 || tokens.empty()) {
    return table;
  }
  auto plan = plan_runs(tokens, used, reinterpret_cast<char*>(table.mutable_data_ptr<Out>()),
                        table.stride(0) * static_cast<int64_t>(sizeof(Out)), sums == Sums::kPacked,
                        task.scale_grad_by_freq);
  const bool add = sums == Sums::kAdded;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(Out));
  const bool streamed =
      table.is_contiguous() &&
      worth_streaming(table.const_data_ptr<Out>(), table.size(0) * row_bytes, row_bytes);
  const In* data = rows.grad.const_data_ptr<In>();
  std::vector<Acc> scratch(plan.partial.size() * width);  // the last thing that can fail
  for (size_t k = 0; k < plan.partial.size(); ++k) {
    plan.partial[k].out = scratch.data() + k * width;
  }
  sum_in_parallel<In, Out>(plan.direct, tokens, data, rows.stride, width, add, streamed);
  if (!plan.partial.empty()) {
    sum_in_parallel<In, Acc>(plan.partial, tokens, data, rows.stride, width, /*add=*/false,
                             /*streamed=*/false);
    sum_in_parallel<Acc, Out>(plan.combine, plan.scratch_tokens, scratch.data(), width, width, add,
                              /*streamed=*/false);
  }
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
    const auto real = at::view_as_real(grad_output.resolve_conj()).flatten(-2);
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
