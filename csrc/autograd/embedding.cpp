// d embedding / d weight: the gradient of a gather is a scatter-add, dense or sparse.
#include <torch/library.h>

#include "node.h"

namespace embed_ext {
namespace {

// grad [..., D], indices [...] -> [V, D]
at::Tensor scatter_add(const at::Tensor& grad, const at::Tensor& indices,
                       const c10::SymInt& num_weights, const c10::SymInt& padding_idx,
                       bool scale_grad_by_freq, bool sparse) {
  const auto& backward = sparse ? sparse_backward_op() : dense_backward_op();
  return backward.call(grad, indices, num_weights, padding_idx, scale_grad_by_freq);
}

struct EmbeddingBackward : public LookupNode {
  std::string name() const override { return "embed_ext::EmbeddingBackward"; }
  Formula formula() const override { return &scatter_add; }
};

// weight [V, D], indices [...] -> [..., D]
at::Tensor embedding(c10::DispatchKeySet keys, const at::Tensor& weight, const at::Tensor& indices,
                     c10::SymInt padding_idx, bool scale_grad_by_freq, bool sparse) {
  // A weight of another rank is turned down below, by the check that every device shares.
  const auto num_weights = weight.dim() == 2 ? weight.sym_size(0) : c10::SymInt(0);
  return record_linear<EmbeddingBackward>(
      weight, indices, num_weights, padding_idx, scale_grad_by_freq, sparse,
      [&](const at::Tensor& table) {
        return embedding_op().redispatch(keys & c10::after_autograd_keyset, table, indices,
                                         padding_idx, scale_grad_by_freq, sparse);
      },
      [&](const at::Tensor& tangent) {
        return embedding_op().call(tangent, indices, padding_idx, scale_grad_by_freq, sparse);
      });
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Autograd, m) { m.impl("embedding", TORCH_FN(embed_ext::embedding)); }
