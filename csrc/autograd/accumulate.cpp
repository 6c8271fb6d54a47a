#include "accumulate.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/anomaly_mode.h>

#include "../checks.h"
#include "graph_task.h"
#include "leaf.h"

namespace embed_ext {
namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::InputBuffer;
using torch::autograd::Node;

AccumulateGrad* accumulator_after(const Node& node) {
  return dynamic_cast<AccumulateGrad*>(node.next_edge(0).function.get());
}

// Whether the engine runs `node` now and is alone to get what it returns. Somebody's hook or
// formula may call a node by hand; anomaly mode and hooks of the node look at its gradient.
bool goes_to_the_engine(const Node& node) {
  return torch::autograd::get_current_node().get() == &node &&
         !torch::autograd::AnomalyMode::is_enabled() && node.post_hooks().empty();
}

// Hooks of the leaf look at the sum of its gradients, or at .grad before and after it was added.
bool nobody_watches(AccumulateGrad& accumulator) {
  return accumulator.pre_hooks().empty() && accumulator.post_hooks().empty() &&
         accumulator.tensor_pre_hooks().empty() &&
         accumulator.tensor_post_acc_grad_hooks() == nullptr;
}

// backward() without inputs: with them, or in torch.autograd.grad, a gradient is handed to the
// caller and not added to .grad.
bool accumulates_everything() {
  const auto* wanted = torch::autograd::get_current_graph_task_exec_info();
  return wanted != nullptr && wanted->empty();
}

// Whether a gradient [num_weights, D] can be added to `table` row by row. Both sizes are what they
// were in the forward; a .grad may be another by now.
bool takes_rows(const at::Tensor& table, const at::Tensor& grad_output, const at::Tensor& indices,
                int64_t num_weights) {
  const int64_t width = grad_output.size(-1);
  return is_plain_call(table) && table.dim() == 2 && table.size(0) == num_weights &&
         table.size(1) == width && table.scalar_type() == grad_output.scalar_type() &&
         !table.is_complex() && table.device() == grad_output.device() && !table.requires_grad() &&
         (width <= 1 || table.stride(1) == 1) && table.stride(0) >= width &&
         !share_memory(table, grad_output) && !share_memory(table, indices);
}

c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// The engine makes AccumulateGrad's stream wait for the node's, and whoever called backward() for
// AccumulateGrad's; on any other stream nobody waits for what is added here.
bool on_stream_of(const AccumulateGrad& accumulator, c10::Device device) {
  return device.is_cpu() || (accumulator.num_inputs() == 1 &&
                             accumulator.input_metadata(0).stream() == current_stream(device));
}

// What has arrived at `accumulator`, or null. To be called under the graph task's lock.
InputBuffer* arrived_at(torch::autograd::GraphTask& task, AccumulateGrad& accumulator) {
  const auto found = task.not_ready_.find(&accumulator);
  return found != task.not_ready_.end() && found->second.buffer.size() == 1 ? &found->second
                                                                            : nullptr;
}

// Whether what has arrived was made on the stream that is current. Somebody who has let go of it
// but still reads it on another stream is not waited for, as the engine would not when it sums.
bool is_ready(const InputBuffer& arrived, c10::Device device) {
  return device.is_cpu() ||
         (arrived.ready_streams.size() == 1 && arrived.ready_streams[0] == current_stream(device));
}

// Whether the reference in the engine's hands is the only way to `sum` and its memory, except for
// `kept` and for the tensor that it is a view of, if the view alone keeps that one: so arrives the
// gradient of x @ w.t().
bool nobody_else_has(const at::Tensor& sum, const KeptGradient* kept) {
  if (sum.use_count() != 1 || !sum.has_storage()) {
    return false;
  }
  size_t owners = kept != nullptr && kept->keeps(sum) ? 2 : 1;
  if (const auto* meta = torch::autograd::impl::get_view_autograd_meta(sum)) {
    if (!meta->has_bw_view() || meta->get_backward_view().base_.use_count() != 1 ||
        (meta->has_fw_view() && !meta->shared_view_info())) {
      return false;
    }
    ++owners;
  }
  return sum.storage().use_count() == owners;
}

// Whether nothing but `node` adds to what it adds to: then no sum of several gradients is to be
// made first, and none that could fail half-way.
bool feeds_alone(AccumulateGrad& accumulator) {
  auto* const task = running_graph_task();
  if (task == nullptr) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(task->mutex_);
  const auto to_come = task->dependencies_.find(&accumulator);
  const auto* const arrived = arrived_at(*task, accumulator);
  return to_come != task->dependencies_.end() && to_come->second == 1 &&
         (arrived == nullptr || !arrived->buffer[0].defined());
}

}  // namespace

SumOnItsWay::SumOnItsWay(const Node& node, const at::Tensor& grad_output, const at::Tensor& indices,
                         int64_t num_weights, const KeptGradient* kept) {
  auto* const accumulator = accumulator_after(node);
  auto* const task = running_graph_task();
  if (accumulator == nullptr || task == nullptr || !goes_to_the_engine(node) ||
      !on_stream_of(*accumulator, grad_output.device())) {
    return;
  }
  lock_ = std::unique_lock<std::mutex>(task->mutex_);
  const auto* const arrived = arrived_at(*task, *accumulator);
  if (arrived != nullptr && arrived->buffer[0].defined() &&
      nobody_else_has(arrived->buffer[0], kept) && is_ready(*arrived, grad_output.device()) &&
      takes_rows(arrived->buffer[0], grad_output, indices, num_weights)) {
    sum_ = arrived->buffer[0];
  } else {
    lock_.unlock();
  }
}

GradToAddTo::GradToAddTo(const Node& node, const at::Tensor& grad_output, const at::Tensor& indices,
                         int64_t num_weights) {
  auto* const accumulator = accumulator_after(node);
  if (accumulator == nullptr || !accumulates_everything() || !goes_to_the_engine(node) ||
      !nobody_watches(*accumulator) || !on_stream_of(*accumulator, grad_output.device()) ||
      !feeds_alone(*accumulator)) {
    return;
  }
  lock_ = std::unique_lock<std::mutex>(mutex_of(*accumulator));
  const at::Tensor& variable = accumulator->variable;
  // Read once: others may set it to None meanwhile.
  at::Tensor grad = still_accumulates(variable) ? variable.grad() : at::Tensor();
  if (takes_rows(grad, grad_output, indices, num_weights)) {
    grad_ = std::move(grad);
  } else {
    lock_.unlock();
  }
}

}  // namespace embed_ext
