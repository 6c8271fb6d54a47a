// Shapes without data: what torch.compile, torch.export, FakeTensor and the meta device ask for.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"

namespace embed_ext {
namespace {

// weight [V, D], indices [...] -> [..., D]
at::Tensor embedding_meta(const at::Tensor& weight, const at::Tensor& indices,
                          c10::SymInt /*padding_idx*/, bool /*scale_grad_by_freq*/, bool /*sparse*/,
                          bool /*coalesced*/) {
  check_lookup("embedding", weight, indices);
  c10::SymDimVector sizes(indices.sym_sizes());
  sizes.push_back(weight.sym_size(1));
  return at::empty_symint(sizes, weight.options());
}

// grad_output [..., D], indices [...] -> [num_weights, D]
at::Tensor embedding_dense_backward_meta(const at::Tensor& grad_output, const at::Tensor& indices,
                                         c10::SymInt num_weights, c10::SymInt /*padding_idx*/,
                                         bool /*scale_grad_by_freq*/) {
  check_grad("embedding_dense_backward", grad_output, indices, num_weights);
  return at::empty_symint({num_weights, grad_output.sym_size(-1)}, grad_output.options());
}

// grad_output [..., D], indices [...] -> sparse [num_weights, D]. How many entries a padding row
// and a row that is used again take away depends on the data, so that without data there is one a
// token.
at::Tensor embedding_sparse_backward_meta(const at::Tensor& grad_output, const at::Tensor& indices,
                                          c10::SymInt num_weights, c10::SymInt /*padding_idx*/,
                                          bool /*scale_grad_by_freq*/, bool coalesced) {
  check_grad("embedding_sparse_backward", grad_output, indices, num_weights);
  const auto width = grad_output.sym_size(-1);
  const auto rows = at::empty_symint({1, indices.sym_numel()}, indices.options().dtype(at::kLong));
  const auto values = at::empty_symint({indices.sym_numel(), width}, grad_output.options());
  return at::_sparse_coo_tensor_unsafe_symint(rows, values, {num_weights, width},
                                              values.options().layout(at::kSparse),
                                              coalesced ? std::optional(true) : std::nullopt);
}

void embedding_grad_add_meta(const at::Tensor& grad_weight, const at::Tensor& grad_output,
                             const at::Tensor& indices, c10::SymInt /*padding_idx*/,
                             bool /*scale_grad_by_freq*/) {
  check_grad_add("embedding_grad_add_", grad_weight, grad_output, indices);
}

void embedding_renorm_meta(const at::Tensor& weight, const at::Tensor& indices, double max_norm,
                           double norm_type) {
  check_renorm("embedding_renorm_", weight, indices, max_norm, norm_type);
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Meta, m) {
  m.impl("embedding", TORCH_FN(embed_ext::embedding_meta));
  m.impl("embedding_dense_backward", TORCH_FN(embed_ext::embedding_dense_backward_meta));
  m.impl("embedding_sparse_backward", TORCH_FN(embed_ext::embedding_sparse_backward_meta));
  m.impl("embedding_grad_add_", TORCH_FN(embed_ext::embedding_grad_add_meta));
  m.impl("embedding_renorm_", TORCH_FN(embed_ext::embedding_renorm_meta));
}
