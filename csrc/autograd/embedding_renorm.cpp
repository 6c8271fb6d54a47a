// max_norm changes the table behind autograd's back, as in torch: it has no gradient, is refused on
// a table that autograd is recording, and raises the version so that a saved table is caught.
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

namespace embed_ext {
namespace {

const auto& renorm_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("embed_ext::embedding_renorm_", "")
                             .typed<void(const at::Tensor&, const at::Tensor&, double, double)>();
  return op;
}

// weight [V, D], indices [...]
void embedding_renorm_autograd(c10::DispatchKeySet keys, const at::Tensor& weight,
                               const at::Tensor& indices, double max_norm, double norm_type) {
  using namespace torch::autograd;
  const bool recording = compute_requires_grad(weight);
  check_inplace(weight, recording);
  TORCH_CHECK(!recording, "embedding_renorm_: has no derivative; call it under torch.no_grad()");
  at::AutoDispatchBelowAutograd guard;
  renorm_op().redispatch(keys & c10::after_autograd_keyset, weight, indices, max_norm, norm_type);
}

// weight [V, D], indices [...]
void embedding_renorm_inplace(c10::DispatchKeySet keys, const at::Tensor& weight,
                              const at::Tensor& indices, double max_norm, double norm_type) {
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    renorm_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, weight, indices, max_norm,
                           norm_type);
  }
  torch::autograd::increment_version(weight);
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Autograd, m) {
  m.impl("embedding_renorm_", TORCH_FN(embed_ext::embedding_renorm_autograd));
}

TORCH_LIBRARY_IMPL(embed_ext, ADInplaceOrView, m) {
  m.impl("embedding_renorm_", TORCH_FN(embed_ext::embedding_renorm_inplace));
}
