// grad_weight[v] += sum of grad_output[i] over all i with indices[i] = v, in place, at the price of
// the rows in use; see embedding_dense_backward.cpp for the sum.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"
#include "dense_gradient.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_grad_add_";

// grad_weight [V, D] with unit inner stride, grad_output [..., D], indices [...]
void embedding_grad_add_(const at::Tensor& grad_weight, const at::Tensor& grad_output,
                         const at::Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq) {
  check_grad_add(kOp, grad_weight, grad_output, indices);
  const bool is_complex = grad_output.is_complex();  // as real rows twice as wide
  const auto grad = is_complex ? at::view_as_real(grad_output).flatten(-2) : grad_output;
  const auto table = is_complex ? at::view_as_real(grad_weight).flatten(-2) : grad_weight;
  const DenseGradient task{grad, indices, table.size(0), padding_idx, scale_grad_by_freq};
  sum_gradient(kOp, task, Sums::kAdded, table.scalar_type(),
               [&](const std::vector<int64_t>&) { return table; });
}

}  // namespace
}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) {
  m.impl("embedding_grad_add_", TORCH_FN(embed_ext::cpu::embedding_grad_add_));
}
