#include "graph_task.h"

#include <cstddef>

namespace embed_ext {

// The engine hands out the addresses of two members of its GraphTask and the value of a third. It
// is believed to be where the first says if all three agree.
torch::autograd::GraphTask* running_graph_task() {
  using torch::autograd::GraphTask;
  const auto* info = torch::autograd::get_current_graph_task_exec_info();
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (info == nullptr || nodes == nullptr) {
    return nullptr;
  }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"  // GraphTask has no base that is virtual
  const auto begin = reinterpret_cast<uintptr_t>(info) - offsetof(GraphTask, exec_info_);
  const auto from_nodes = reinterpret_cast<uintptr_t>(nodes) - offsetof(GraphTask, nodes_in_graph_);
#pragma GCC diagnostic pop
  auto* const task = reinterpret_cast<GraphTask*>(begin);
  const bool agree = begin == from_nodes &&
                     static_cast<int>(task->id_) == torch::autograd::get_current_graph_task_id();
  return agree ? task : nullptr;
}

}  // namespace embed_ext
