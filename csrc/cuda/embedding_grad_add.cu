// grad_weight[v] += sum of grad_output[i] over all i with indices[i] = v, in place, at the price of
// the rows in use; see dense_gradient.cu for the sum.
#include <ATen/ops/view_as_real.h>
#include <torch/library.h>

#include "../checks.h"
#include "dense_backward.cuh"

namespace embed_ext::cuda {
namespace {

constexpr const char* kOp = "embedding_grad_add_";

// grad_weight [V, D] with unit inner stride, grad_output [..., D], indices [...]
void embedding_grad_add_(const at::Tensor& grad_weight, const at::Tensor& grad_output,
                         const at::Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq) {
  check_grad_add(kOp, grad_weight, grad_output, indices);
  const bool is_complex = grad_output.is_complex();
  const auto grad = is_complex ? at::view_as_real(grad_output).flatten(-2) : grad_output;
  const auto table = is_complex ? at::view_as_real(grad_weight).flatten(-2) : grad_weight;
  sum_gradient(kOp, {grad, indices, table.size(0), padding_idx, scale_grad_by_freq},
               RowsOfOut::kAdded, [&] { return table; });
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding_grad_add_", TORCH_FN(embed_ext::cuda::embedding_grad_add_));
}
