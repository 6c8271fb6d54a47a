// What the autograd nodes of this folder share.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <optional>
#include <type_traits>

namespace embed_ext {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using EmbeddingSignature = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt, bool, bool,
                                      bool);
using DenseBackwardSignature = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt,
                                          c10::SymInt, bool);
using SparseBackwardSignature = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt,
                                           c10::SymInt, bool, bool);
using EmbeddingOp = c10::TypedOperatorHandle<EmbeddingSignature>;
using DenseBackwardOp = c10::TypedOperatorHandle<DenseBackwardSignature>;
using SparseBackwardOp = c10::TypedOperatorHandle<SparseBackwardSignature>;

// The ops as the dispatcher sees them: a formula written with these is differentiable itself.
const EmbeddingOp& embedding_op();
const DenseBackwardOp& dense_backward_op();
const SparseBackwardOp& sparse_backward_op();

// From torch 2.13 on a Node counts its own references; before, a shared_ptr did, with a deleter
// that takes long graphs apart without recursion.
template <class NodeT>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, NodeT>) {
    return c10::make_intrusive<NodeT>();
  } else {
    return std::shared_ptr<NodeT>(new NodeT(), [](auto* node) { deleteNode(node); });
  }
}

// grad of the output, indices, and the scalars that a LookupNode remembers -> grad of the input
using Formula = at::Tensor (*)(const at::Tensor& grad, const at::Tensor& indices,
                               const c10::SymInt& num_weights, const c10::SymInt& padding_idx,
                               bool scale_grad_by_freq, bool sparse, bool coalesced);

// A node of one differentiable tensor input, linear in it. All of them remember the same things.
struct LookupNode : public torch::autograd::TraceableFunction {
  SavedVariable indices;
  c10::SymInt num_weights;
  c10::SymInt padding_idx;
  bool scale_grad_by_freq = false;
  bool sparse = false;
  bool coalesced = false;  // of a sparse gradient

  // A plain function, so that compiled autograd can hold on to it without this node.
  virtual Formula formula() const = 0;

  // The same without going through the operators, where the call allows it; nothing where not.
  virtual std::optional<at::Tensor> in_place(const at::Tensor& /*grad*/,
                                             const at::Tensor& /*indices*/) {
    return std::nullopt;
  }

  variable_list apply(variable_list&& grads) override;
  void release_variables() override;
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override;
};

// Runs `below`, the op under autograd, on `input` and records a NodeT if a gradient may be asked
// for. The ops are linear, so that the forward-mode tangent is the op itself, `whole` (autograd
// included: the tangent may be differentiated too), applied to the input's tangent.
template <class NodeT, class Below, class Whole>
at::Tensor record_linear(const at::Tensor& input, const at::Tensor& indices,
                         const c10::SymInt& num_weights, const c10::SymInt& padding_idx,
                         bool scale_grad_by_freq, bool sparse, const Below& below,
                         const Whole& whole) {
  using namespace torch::autograd;
  decltype(make_node<NodeT>()) node;
  if (compute_requires_grad(input)) {
    node = make_node<NodeT>();
    node->set_next_edges(collect_next_edges(input));
    node->indices = SavedVariable(indices, /*is_output=*/false);
    node->num_weights = num_weights;
    node->padding_idx = padding_idx;
    node->scale_grad_by_freq = scale_grad_by_freq;
    node->sparse = sparse;
  }
  at::Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return below(input);
  }();
  if (node) {
    set_history(out, node);
  }
  if (isFwGradDefined(input)) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !out.is_sparse(),
        "embedding_sparse_backward: forward-mode AD has no sparse tangents; use sparse=False");
    out._set_fw_grad(whole(input._fw_grad(/*level=*/0)), /*level=*/0, /*is_inplace_op=*/false);
  }
  return out;
}

}  // namespace embed_ext
