// Double backward: d embedding_{dense,sparse}_backward / d grad_output, the gradient of a
// scatter-add, which is a gather again.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "coalesced_mark.h"
#include "node.h"

namespace embed_ext {
namespace {

// grad [V, D], dense or sparse, indices [...] -> [..., D]
at::Tensor gather(const at::Tensor& grad, const at::Tensor& indices,
                  const c10::SymInt& padding_idx) {
  if (!grad.is_sparse()) {
    return embedding_op().call(grad, indices, padding_idx, /*scale_grad_by_freq=*/false,
                               /*sparse=*/false, /*coalesced=*/false);
  }
  c10::SymDimVector sizes(indices.sym_sizes());
  sizes.push_back(grad.sym_size(1));
  return grad.index_select(0, indices.reshape({-1}).to(at::kLong)).to_dense().reshape_symint(sizes);
}

// grad [V, D], indices [...] -> [..., D]. Not divided by the row frequencies under
// scale_grad_by_freq: what this gradient reaches next is the lookup, whose backward divides by
// them.
at::Tensor gather_unpadded(const at::Tensor& grad, const at::Tensor& indices,
                           const c10::SymInt& /*num_weights*/, const c10::SymInt& padding_idx,
                           bool /*scale_grad_by_freq*/, bool /*sparse*/, bool /*coalesced*/) {
  auto result = gather(grad, indices, padding_idx);
  if (padding_idx >= 0) {
    const auto is_padding = indices.to(at::kLong).eq(c10::Scalar(padding_idx));
    result = result.masked_fill(is_padding.unsqueeze(-1), 0);
  }
  return result;
}

struct BackwardBackward : public LookupNode {
  std::string name() const override { return "embed_ext::EmbeddingBackwardBackward"; }
  Formula formula() const override { return &gather_unpadded; }
};

// grad_output [..., D], indices [...] -> [num_weights, D]. `options`: of this op alone.
template <class Signature, class... Options>
at::Tensor record(const c10::TypedOperatorHandle<Signature>& op, bool sparse,
                  c10::DispatchKeySet keys, const at::Tensor& grad_output,
                  const at::Tensor& indices, const c10::SymInt& num_weights,
                  const c10::SymInt& padding_idx, bool scale_grad_by_freq, Options... options) {
  return record_linear<BackwardBackward>(
      grad_output, indices, num_weights, padding_idx, scale_grad_by_freq, sparse,
      [&](const at::Tensor& grad) {
        return op.redispatch(keys & c10::after_autograd_keyset, grad, indices, num_weights,
                             padding_idx, scale_grad_by_freq, options...);
      },
      [&](const at::Tensor& tangent) {
        return op.call(tangent, indices, num_weights, padding_idx, scale_grad_by_freq, options...);
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
                                     c10::SymInt padding_idx, bool scale_grad_by_freq,
                                     bool coalesced) {
  auto grad = record(sparse_backward_op(), /*sparse=*/true, keys, grad_output, indices, num_weights,
                     padding_idx, scale_grad_by_freq, coalesced);
  if (coalesced) {
    stay_coalesced(grad);
  }
  return grad;
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Autograd, m) {
  m.impl("embedding_dense_backward", TORCH_FN(embed_ext::embedding_dense_backward));
  m.impl("embedding_sparse_backward", TORCH_FN(embed_ext::embedding_sparse_backward));
}
