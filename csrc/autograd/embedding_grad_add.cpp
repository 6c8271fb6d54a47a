// Adding to a gradient that somebody keeps is no part of a graph: it is refused where autograd
// would have to record it, and raises the version so that a saved grad_weight is caught.
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

namespace embed_ext {
namespace {

const auto& grad_add_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("embed_ext::embedding_grad_add_", "")
                             .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         c10::SymInt, bool)>();
  return op;
}

// grad_weight [V, D], grad_output [..., D], indices [...]
void embedding_grad_add_autograd(c10::DispatchKeySet keys, const at::Tensor& grad_weight,
                                 const at::Tensor& grad_output, const at::Tensor& indices,
                                 c10::SymInt padding_idx, bool scale_grad_by_freq) {
  using namespace torch::autograd;
  const bool recording = compute_requires_grad(grad_weight, grad_output);
  check_inplace(grad_weight, recording);
  TORCH_CHECK(!recording && !isFwGradDefined(grad_weight) && !isFwGradDefined(grad_output),
              "embedding_grad_add_: has no derivative; call it under torch.no_grad(), on "
              "tensors without tangents");
  at::AutoDispatchBelowAutograd guard;
  grad_add_op().redispatch(keys & c10::after_autograd_keyset, grad_weight, grad_output, indices,
                           padding_idx, scale_grad_by_freq);
}

// grad_weight [V, D], grad_output [..., D], indices [...]
void embedding_grad_add_inplace(c10::DispatchKeySet keys, const at::Tensor& grad_weight,
                                const at::Tensor& grad_output, const at::Tensor& indices,
                                c10::SymInt padding_idx, bool scale_grad_by_freq) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    grad_add_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_weight, grad_output,
                             indices, padding_idx, scale_grad_by_freq);
  }
  torch::autograd::increment_version(grad_weight);
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Autograd, m) {
  m.impl("embedding_grad_add_", TORCH_FN(embed_ext::embedding_grad_add_autograd));
}

TORCH_LIBRARY_IMPL(embed_ext, ADInplaceOrView, m) {
  m.impl("embedding_grad_add_", TORCH_FN(embed_ext::embedding_grad_add_inplace));
}
