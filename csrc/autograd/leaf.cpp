#include "leaf.h"

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace embed_ext {
namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::Node;

// Node::mutex_ is protected.
struct MutexOf : public AccumulateGrad {
  static std::mutex& of(Node& node) { return node.*(&MutexOf::mutex_); }
};

c10::DispatchKeySet watchers() {
  using c10::DispatchKey;
  return c10::DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot,
                              DispatchKey::Fake, DispatchKey::FuncTorchDynamicLayerFrontMode,
                              DispatchKey::FuncTorchDynamicLayerBackMode,
                              DispatchKey::Functionalize, DispatchKey::Tracer});
}

}  // namespace

std::mutex& mutex_of(AccumulateGrad& accumulator) { return MutexOf::of(accumulator); }

bool still_accumulates(const at::Tensor& variable) {
  return variable.defined() && variable.requires_grad() && variable.grad_fn() == nullptr;
}

bool any_watches() {
  return !(c10::impl::tls_local_dispatch_key_set().included_ & watchers()).empty();
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.defined() && !tensor.is_meta() && (tensor.key_set() & watchers()).empty();
}

bool is_plain_call(const at::Tensor& tensor) {
  using c10::DispatchKey;
  const c10::DispatchKeySet plain(
      {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
       DispatchKey::AutogradCUDA, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  return tensor.defined() && !at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         !tensor.is_inference() && tensor.layout() == at::kStrided &&
         plain.isSupersetOf(tensor.key_set()) && !any_watches() &&
         !torch::autograd::isFwGradDefined(tensor);
}

}  // namespace embed_ext
