#include "node.h"

namespace embed_ext {
namespace {

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

const EmbeddingOp& embedding_op() {
  static const EmbeddingOp op = find_op<EmbeddingSignature>("embed_ext::embedding");
  return op;
}

const BackwardOp& dense_backward_op() {
  static const BackwardOp op = find_op<BackwardSignature>("embed_ext::embedding_dense_backward");
  return op;
}

const BackwardOp& sparse_backward_op() {
  static const BackwardOp op = find_op<BackwardSignature>("embed_ext::embedding_sparse_backward");
  return op;
}

variable_list LookupNode::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);  // release_variables may run on another thread
  TORCH_INTERNAL_ASSERT(grads.size() == 1);
  if (!grads[0].defined() || !task_should_compute_output(0)) {
    return {at::Tensor()};
  }
  return {formula(grads[0], indices.unpack())};
}

void LookupNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  indices.reset_data();
}

void LookupNode::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  args.collect(indices, /*is_output=*/false);
  args.collect(num_weights);
  args.collect(padding_idx);
  args.collect(scale_grad_by_freq);
  args.collect(sparse);
}

variable_list LookupNode::apply_with_saved(const variable_list& grads,
                                           torch::dynamo::autograd::SwapSavedVariables& saved) {
  saved.before(indices);
  saved.before(num_weights);
  saved.before(padding_idx);
  variable_list result = apply(variable_list(grads));
  saved.after(indices);
  saved.after(num_weights);
  saved.after(padding_idx);
  return result;
}

}  // namespace embed_ext
