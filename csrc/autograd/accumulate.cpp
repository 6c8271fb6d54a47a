#include "accumulate.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>

namespace embed_ext {
namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::Node;

// Node::mutex_ is what AccumulateGrad::apply holds while it changes .grad; it is protected.
struct MutexOf : public AccumulateGrad {
  static std::mutex& of(Node& node) { return node.*(&MutexOf::mutex_); }
};

// backward() without inputs: with them, or in torch.autograd.grad, a gradient is handed to the
// caller and not added to .grad.
bool accumulates_everything() {
  const auto* wanted = torch::autograd::get_current_graph_task_exec_info();
  return wanted != nullptr && wanted->empty();
}

bool nobody_watches(Node& node, AccumulateGrad& accumulator) {
  return node.post_hooks().empty() && accumulator.pre_hooks().empty() &&
         accumulator.post_hooks().empty() && accumulator.tensor_pre_hooks().empty() &&
         accumulator.tensor_post_acc_grad_hooks() == nullptr;
}

bool fits(const at::Tensor& grad, const at::Tensor& variable, const at::Tensor& grad_output) {
  return grad.layout() == at::kStrided && grad.sizes() == variable.sizes() &&
         grad.scalar_type() == grad_output.scalar_type() && !grad.is_complex() &&
         !grad.requires_grad() && grad.dim() == 2 && (grad.size(1) <= 1 || grad.stride(1) == 1) &&
         grad.stride(0) >= grad.size(1);
}

}  // namespace

bool is_plain_cpu_call(const at::Tensor& tensor) {
  using c10::DispatchKey;
  const c10::DispatchKeySet plain({DispatchKey::CPU, DispatchKey::ADInplaceOrView,
                                   DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  const c10::DispatchKeySet watchers({DispatchKey::Python, DispatchKey::PythonTLSSnapshot,
                                      DispatchKey::FuncTorchDynamicLayerFrontMode,
                                      DispatchKey::FuncTorchDynamicLayerBackMode,
                                      DispatchKey::Functionalize});
  return tensor.defined() && !at::GradMode::is_enabled() && tensor.layout() == at::kStrided &&
         plain.isSupersetOf(tensor.key_set()) &&
         (c10::impl::tls_local_dispatch_key_set().included_ & watchers).empty();
}

GradToAddTo::GradToAddTo(Node& node, const at::Tensor& grad_output) {
  auto* accumulator = dynamic_cast<AccumulateGrad*>(node.next_edge(0).function.get());
  if (accumulator == nullptr || !accumulates_everything() || !nobody_watches(node, *accumulator)) {
    return;
  }
  lock_ = std::unique_lock<std::mutex>(MutexOf::of(*accumulator));
  const at::Tensor& grad = accumulator->variable.grad();
  if (grad.defined() && is_plain_cpu_call(grad) && fits(grad, accumulator->variable, grad_output)) {
    grad_ = grad;
  } else {
    lock_.unlock();
  }
}

}  // namespace embed_ext
