// Dense gradient on CUDA: grad_weight[v] = sum of grad_output[i] over all i with indices[i] = v;
// see dense_gradient.cu for the sum.
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>
#include <torch/library.h>

#include "../checks.h"
#include "dense_backward.cuh"
#include "uninitialized.h"

namespace embed_ext::cuda {
namespace {

constexpr const char* kOp = "embedding_dense_backward";

// grad_output [..., D], indices [...] -> [num_weights, D]
at::Tensor embedding_dense_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                    int64_t num_weights, int64_t padding_idx,
                                    bool scale_grad_by_freq) {
  check_grad(kOp, grad_output, indices, num_weights);
  if (grad_output.is_complex()) {  // a sum of complex rows is a sum of real rows twice as wide
    const auto real = at::view_as_real(grad_output).flatten(-2);
    const auto out =
        embedding_dense_backward(real, indices, num_weights, padding_idx, scale_grad_by_freq);
    return at::view_as_complex(out.view({num_weights, grad_output.size(-1), 2}));
  }
  return sum_gradient(
      kOp, {grad_output, indices, num_weights, padding_idx, scale_grad_by_freq},
      RowsOfOut::kAllWritten,
      [&] { return uninitialized({num_weights, grad_output.size(-1)}, grad_output.options()); });
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding_dense_backward", TORCH_FN(embed_ext::cuda::embedding_dense_backward));
}
