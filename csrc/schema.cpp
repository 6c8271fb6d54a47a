// The operators of the `embed_ext` namespace. Every kernel elsewhere registers against these lines.
//
// Shapes: weight [V, D], indices [...], grad_weight [V, D], out and grad_output [..., D]. Of
// updates: indices [N] and values [N, D], the parts of a sparse gradient, which ascend and differ
// if it is coalesced; states [V, D] or [V]. `padding_idx = -1` means "no padding row"; the Python
// layer resolves negative rows before it calls.
#include <torch/library.h>

TORCH_LIBRARY(embed_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  m.def(
      "embedding(Tensor weight, Tensor indices, SymInt padding_idx=-1, "
      "bool scale_grad_by_freq=False, bool sparse=False, bool coalesced=False) -> Tensor",
      tags);
  m.def(
      "embedding_dense_backward(Tensor grad_output, Tensor indices, SymInt num_weights, "
      "SymInt padding_idx=-1, bool scale_grad_by_freq=False) -> Tensor",
      tags);
  m.def(
      "embedding_sparse_backward(Tensor grad_output, Tensor indices, SymInt num_weights, "
      "SymInt padding_idx=-1, bool scale_grad_by_freq=False, bool coalesced=False) -> Tensor",
      tags);
  m.def(
      "embedding_grad_add_(Tensor(a!) grad_weight, Tensor grad_output, Tensor indices, "
      "SymInt padding_idx=-1, bool scale_grad_by_freq=False) -> ()",
      tags);
  m.def(
      "embedding_renorm_(Tensor(a!) weight, Tensor indices, float max_norm, float norm_type=2.0) "
      "-> ()",
      tags);

  m.def(
      "embedding_sgd_(Tensor(a!) weight, Tensor(b!)? momentum_buffer, Tensor indices, "
      "Tensor values, float lr, float weight_decay=0., float momentum=0., float dampening=0., "
      "bool nesterov=False, bool maximize=False, int? seed=None, bool coalesced=True) -> ()",
      tags);
  m.def(
      "embedding_adagrad_(Tensor(a!) weight, Tensor(b!) sum, Tensor indices, Tensor values, "
      "float lr, float weight_decay=0., float eps=1e-10, bool maximize=False, int? seed=None, bool "
      "coalesced=True) "
      "-> ()",
      tags);
  m.def(
      "embedding_adam_(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor indices, Tensor values, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled, int step, bool maximize=False, int? seed=None, bool "
      "coalesced=True) -> ()",
      tags);
}
