// The backward that is running in this thread, as PyTorch's engine keeps it.
#pragma once

#include <torch/csrc/autograd/graph_task.h>

namespace embed_ext {

// Null outside of a backward, or if the engine keeps it in another way than the headers say that
// this was compiled with. Its mutex_ guards not_ready_ and dependencies_.
torch::autograd::GraphTask* running_graph_task();

}  // namespace embed_ext
