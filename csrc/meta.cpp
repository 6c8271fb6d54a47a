// Shapes without data: what torch.compile, torch.export, FakeTensor and the meta device ask for.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "update_checks.h"

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

void embedding_sgd_meta(const at::Tensor& weight, const std::optional<at::Tensor>& momentum_buffer,
                        const at::Tensor& indices, const at::Tensor& values, double /*lr*/,
                        double /*weight_decay*/, double momentum, double /*dampening*/,
                        bool /*nesterov*/, bool /*maximize*/, std::optional<int64_t> seed,
                        bool /*coalesced*/) {
  const auto buffer = momentum_buffer.value_or(at::Tensor());
  check_update("embedding_sgd_", weight, indices, values, {{"momentum_buffer", buffer, false}},
               seed);
  check_momentum("embedding_sgd_", buffer, momentum);
}

void embedding_adagrad_meta(const at::Tensor& weight, const at::Tensor& sum,
                            const at::Tensor& indices, const at::Tensor& values, double /*lr*/,
                            double /*weight_decay*/, double /*eps*/, bool /*maximize*/,
                            std::optional<int64_t> seed, bool /*coalesced*/) {
  check_update("embedding_adagrad_", weight, indices, values, {{"sum", sum, true}}, seed);
}

void embedding_adam_meta(const at::Tensor& weight, const at::Tensor& exp_avg,
                         const at::Tensor& exp_avg_sq, const at::Tensor& indices,
                         const at::Tensor& values, double /*lr*/, double /*beta1*/,
                         double /*beta2*/, double /*eps*/, double /*weight_decay*/,
                         bool /*decoupled*/, int64_t step, bool /*maximize*/,
                         std::optional<int64_t> seed, bool /*coalesced*/) {
  check_update("embedding_adam_", weight, indices, values,
               {{"exp_avg", exp_avg, false}, {"exp_avg_sq", exp_avg_sq, true}}, seed);
  check_step("embedding_adam_", step);
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Meta, m) {
  m.impl("embedding", TORCH_FN(embed_ext::embedding_meta));
  m.impl("embedding_dense_backward", TORCH_FN(embed_ext::embedding_dense_backward_meta));
  m.impl("embedding_sparse_backward", TORCH_FN(embed_ext::embedding_sparse_backward_meta));
  m.impl("embedding_grad_add_", TORCH_FN(embed_ext::embedding_grad_add_meta));
  m.impl("embedding_renorm_", TORCH_FN(embed_ext::embedding_renorm_meta));
  m.impl("embedding_sgd_", TORCH_FN(embed_ext::embedding_sgd_meta));
  m.impl("embedding_adagrad_", TORCH_FN(embed_ext::embedding_adagrad_meta));
  m.impl("embedding_adam_", TORCH_FN(embed_ext::embedding_adam_meta));
}
