// Double backward: d embedding_{dense,sparse}_backward / d grad_output, the gradient of a
// scatter-add, which is a gather again.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "node.h"

namespace embed_ext {
namespace {

// How often the row of each token occurs: indices [...] -> [..., 1]
at::Tensor frequency(const at::Tensor& indices, const c10::SymInt& num_weights,
                     const at::TensorOptions& options) {
  c10::SymDimVector sizes(indices.sym_sizes());
  sizes.emplace_back(1);
  const auto ones = at::ones_symint(sizes, options);
  const auto per_row = dense_backward_op().call(ones, indices, num_weights, /*padding_idx=*/-1,
                                                /*scale_grad_by_freq=*/false);
  return embedding_op().call(per_row, indices, /*padding_idx=*/-1, /*scale_grad_by_freq=*/false,
                             /*sparse=*/false);
}

// grad [V, D], dense or sparse, indices [...] -> [..., D]
at::Tensor gather(const at::Tensor& grad, const at::Tensor& indices,
                  const c10::SymInt& padding_idx) {
  if (!grad.is_sparse()) {
    return embedding_op().call(grad, indices, padding_idx, /*scale_grad_by_freq=*/false,
                               /*sparse=*/false);
  }
  c10::SymDimVector sizes(indices.sym_sizes());
  sizes.push_back(grad.sym_size(1));
  return grad.index_select(0, indices.reshape({-1}).to(at::kLong)).to_dense().reshape_symint(sizes);
}

struct BackwardBackward : public LookupNode {
  std::string name() const override { return "embed_ext::EmbeddingBackwardBackward"; }

  // grad [V, D], indices [...] -> [..., D]
  at::Tensor formula(const at::Tensor& grad, const at::Tensor& saved_indices) const override {
    auto result = gather(grad, saved_indices, padding_idx);
    if (scale_grad_by_freq) {
      const auto counted_in = grad.options().layout(at::kStrided).dtype(
          c10::toRealValueType(at::toOpMathType(grad.scalar_type())));
      result = (result / frequency(saved_indices, num_weights, counted_in))
                   .to(grad.scalar_type());
    }
    if (padding_idx >= 0) {
      const auto is_padding = saved_indices.to(at::kLong).eq(c10::Scalar(padding_idx));
      result = result.masked_fill(is_padding.unsqueeze(-1), 0);
    }
    return result;
  }
};

// grad_output [..., D], indices [...] -> [num_weights, D]
at::Tensor record(const BackwardOp& op, bool sparse, c10::DispatchKeySet keys,
                  const at::Tensor& grad_output, const at::Tensor& indices,
                  const c10::SymInt& num_weights, const c10::SymInt& padding_idx,
                  bool scale_grad_by_freq) {
  return record_linear<BackwardBackward>(
      grad_output, indices, num_weights, padding_idx, scale_grad_by_freq, sparse,
      [&](const at::Tensor& grad) {
        return op.redispatch(keys & c10::after_autograd_keyset, grad, indices, num_weights,
                             padding_idx, scale_grad_by_freq);
      },
      [&](const at::Tensor& tangent) {
        return op.call(tangent, indices, num_weights, padding_idx, scale_grad_by_freq);
      });
}

at::Tensor embedding_dense_backward(c10::DispatchKeySet keys, const at::Tensor& grad_output,
                                    const at::Tensor& indices, c10::SymInt num_weights,
                                    c10::SymInt padding_idx, bool scale_grad_by_freq) {
  return record(dense_backward_op(), /*sparse=*/false, keys, grad_output, indices, num_weights,
                padding_idx, scale_grad_by_freq);
}

at::Tensor embedding_sparse_backward(c10::DispatchKeySet keys, const at::Tensor& grad_output,
                                     const at::Tensor& indices, c10::SymInt num_weights,
                                     c10::SymInt padding_idx, bool scale_grad_by_freq) {
  return record(sparse_backward_op(), /*sparse=*/true, keys, grad_output, indices, num_weights,
                padding_idx, scale_grad_by_freq);
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Autograd, m) {
  m.impl("embedding_dense_backward", TORCH_FN(embed_ext::embedding_dense_backward));
  m.impl("embedding_sparse_backward", TORCH_FN(embed_ext::embedding_sparse_backward));
}
