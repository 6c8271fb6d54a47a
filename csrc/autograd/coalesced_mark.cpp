#include "coalesced_mark.h"

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <algorithm>
#include <functional>

#include "leaf.h"

namespace embed_ext {
namespace {

using torch::autograd::AccumulateGrad;

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
  const std::lock_guard<std::mutex> lock(mutex_of(static_cast<AccumulateGrad&>(*accumulator)));
  const at::Tensor grad = variable.grad();  // once: others may set it to None meanwhile
  // Who was called with it by the accumulator may be coalescing it at this moment: DDP's all-reduce
  // does, in a thread of its own.
  const bool is_held = grad.use_count() > 2;  // beside the variable and here
  if (is_held && !accumulator->post_hooks().empty()) {
    return;
  }
  if (is_plain(grad) && grad.layout() == at::kSparse && !grad.requires_grad() &&
      grad.unsafeGetTensorImpl()->allow_tensor_metadata_change() && !grad.is_coalesced() &&
      grad.sparse_dim() == 1 && grad._indices().is_contiguous() &&
      rows.stand_for(grad._indices())) {
    grad._coalesced_(true);
  }
}

}  // namespace

void stay_coalesced(const at::Tensor& grad) {
  const auto node = torch::autograd::get_current_node();
  if (node == nullptr || torch::autograd::get_current_graph_task_exec_info() == nullptr ||
      grad.layout() != at::kSparse || !is_plain(grad) || any_watches()) {
    return;
  }
  for (const auto& edge : node->next_edges()) {
    const auto* accumulator = dynamic_cast<AccumulateGrad*>(edge.function.get());
    if (accumulator != nullptr && is_plain(accumulator->variable) &&
        !accumulator->variable.is_nested() && accumulator->variable.sizes() == grad.sizes()) {
      torch::autograd::Engine::get_default_engine().queue_callback(
          [variable = accumulator->variable, rows = Rows(grad._indices())] {
            mark_coalesced(variable, rows);
          });
    }
  }
}

}  // namespace embed_ext
