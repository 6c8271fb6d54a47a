// A dense gradient on the CPU, past the dispatcher; see embedding_dense_backward.cpp for the sum.
#include "dense_gradient.h"

#include <utility>

#include "recycled_memory.h"

namespace embed_ext::cpu {
namespace {

at::Tensor make(const char* op, const DenseGradient& task, KeptGradient* kept) {
  const int64_t width = task.grad_output.size(-1);
  const auto options = task.grad_output.options();
  return sum_gradient(
      op, task, Sums::kWritten, task.grad_output.scalar_type(), [&](std::vector<int64_t>& rows) {
        return kept != nullptr
                   ? kept->zeros(task.num_weights, width, {std::move(rows), {}}, options)
                   : zero_rows(task.num_weights, width, options);
      });
}

void add(const char* op, const DenseGradient& task, const at::Tensor& table, KeptGradient* kept) {
  sum_gradient(op, task, Sums::kAdded, table.scalar_type(), [&](std::vector<int64_t>& rows) {
    if (kept != nullptr) {
      kept->bump_version(table, {std::move(rows), {}});
    } else {
      table.unsafeGetTensorImpl()->bump_version();
    }
    return table;
  });
}

const DenseGradientKernels kernels{&make, &add};
[[maybe_unused]] const bool registered = register_dense_gradient(c10::kCPU, kernels);

}  // namespace
}  // namespace embed_ext::cpu
