#include "accumulate.h"

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "../checks.h"

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
  return !torch::autograd::AnomalyMode::is_enabled() && node.post_hooks().empty() &&
         accumulator.pre_hooks().empty() && accumulator.post_hooks().empty() &&
         accumulator.tensor_pre_hooks().empty() &&
         accumulator.tensor_post_acc_grad_hooks() == nullptr;
}

// AccumulateGrad leaves alone what was frozen since the forward, and raises for what is no leaf.
bool still_accumulates(const at::Tensor& variable) {
  return variable.defined() && variable.requires_grad() && variable.grad_fn() == nullptr;
}

// The gradient's size is what it was in the forward; .grad and the variable may be others by now.
bool fits(const at::Tensor& grad, const at::Tensor& grad_output, const at::Tensor& indices,
          int64_t num_weights) {
  const int64_t width = grad_output.size(-1);
  return grad.dim() == 2 && grad.size(0) == num_weights && grad.size(1) == width &&
         grad.scalar_type() == grad_output.scalar_type() && !grad.is_complex() &&
         grad.device() == grad_output.device() && !grad.requires_grad() &&
         (width <= 1 || grad.stride(1) == 1) && grad.stride(0) >= width &&
         !share_memory(grad, grad_output) && !share_memory(grad, indices);
}

// The engine makes AccumulateGrad's stream wait for the node's, and whoever called backward() for
// AccumulateGrad's; on any other stream nobody waits for what is added here.
bool on_stream_of(const AccumulateGrad& accumulator, c10::Device device) {
  return device.is_cpu() || (accumulator.num_inputs() == 1 &&
                             accumulator.input_metadata(0).stream() ==
                                 c10::impl::VirtualGuardImpl(device.type()).getStream(device));
}

// Transforms and modes, which want to see every operator.
c10::DispatchKeySet watchers() {
  using c10::DispatchKey;
  return c10::DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot,
                              DispatchKey::Fake, DispatchKey::FuncTorchDynamicLayerFrontMode,
                              DispatchKey::FuncTorchDynamicLayerBackMode,
                              DispatchKey::Functionalize, DispatchKey::Tracer});
}

bool any_watches() {
  return !(c10::impl::tls_local_dispatch_key_set().included_ & watchers()).empty();
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.defined() && !tensor.is_meta() && (tensor.key_set() & watchers()).empty();
}

// The rows [1, U] of a coalesced gradient, known by their memory without keeping it.
struct Rows {
  explicit Rows(const at::Tensor& rows)
      : memory(rows.storage().getWeakStorageImpl()), count(rows.size(1)) {}

  // Whether `other` [1, nnz] are these, or, as in a sum of several gradients, others that ascend.
  // On a GPU a look at them would have to wait for it.
  bool stand_for(const at::Tensor& other) const {
    if (other.storage().unsafeGetStorageImpl() == memory._unsafe_get_target()) {
      return other.size(1) == count;
    }
    if (!other.is_cpu()) {
      return false;
    }
    const auto* first = other.const_data_ptr<int64_t>();
    const auto* last = first + other.size(1);
    return std::adjacent_find(first, last, std::greater_equal<>()) == last;
  }

  c10::weak_intrusive_ptr<c10::StorageImpl> memory;
  int64_t count;
};

void mark_coalesced(const at::Tensor& variable, const Rows& rows) {
  if (!still_accumulates(variable)) {
    return;
  }
  const auto accumulator = torch::autograd::impl::grad_accumulator(variable);
  const std::lock_guard<std::mutex> lock(MutexOf::of(*accumulator));
  const at::Tensor& grad = variable.grad();
  if (is_plain(grad) && grad.layout() == at::kSparse && !grad.requires_grad() &&
      grad.unsafeGetTensorImpl()->allow_tensor_metadata_change() && !grad.is_coalesced() &&
      grad.sparse_dim() == 1 && grad._indices().is_contiguous() &&
      rows.stand_for(grad._indices())) {
    grad._coalesced_(true);
  }
}

}  // namespace

void stay_coalesced(const at::Tensor& grad) {
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (nodes == nullptr || grad.layout() != at::kSparse || !is_plain(grad) || any_watches()) {
    return;
  }
  std::vector<at::Tensor> variables;
  for (Node* node : *nodes) {
    const auto* accumulator = dynamic_cast<AccumulateGrad*>(node);
    if (accumulator != nullptr && is_plain(accumulator->variable) &&
        !accumulator->variable.is_nested() && accumulator->variable.sizes() == grad.sizes()) {
      variables.push_back(accumulator->variable);
    }
  }
  const auto mark = [variables = std::move(variables), rows = Rows(grad._indices())] {
    for (const auto& variable : variables) {
      mark_coalesced(variable, rows);
    }
  };
  torch::autograd::Engine::get_default_engine().queue_callback(mark);
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

bool feeds_alone(const Node& node) {
  const Node* const next = node.next_edge(0).function.get();
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (nodes == nullptr) {
    return false;
  }
  for (const Node* other : *nodes) {  // the root is not among them
    for (const auto& edge : other->next_edges()) {
      if (other != &node && edge.function.get() == next) {
        return false;
      }
    }
  }
  return true;
}

GradToAddTo::GradToAddTo(Node& node, const at::Tensor& grad_output, const at::Tensor& indices,
                         int64_t num_weights) {
  auto* accumulator = dynamic_cast<AccumulateGrad*>(node.next_edge(0).function.get());
  if (accumulator == nullptr || !accumulates_everything() || !nobody_watches(node, *accumulator)) {
    return;
  }
  lock_ = std::unique_lock<std::mutex>(MutexOf::of(*accumulator));
  const at::Tensor& variable = accumulator->variable;
  if (still_accumulates(variable) && is_plain_call(variable.grad()) &&
      fits(variable.grad(), grad_output, indices, num_weights) &&
      on_stream_of(*accumulator, grad_output.device()) && feeds_alone(node)) {
    grad_ = variable.grad();
  } else {
    lock_.unlock();
  }
}

}  // namespace embed_ext
