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

const DenseBackwardOp& dense_backward_op() {
  static const DenseBackwardOp op =
      find_op<DenseBackwardSignature>("embed_ext::embedding_dense_backward");
  return op;
}

const SparseBackwardOp& sparse_backward_op() {
  static const SparseBackwardOp op =
      find_op<SparseBackwardSignature>("embed_ext::embedding_sparse_backward");
  return op;
}

variable_list LookupNode::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);  // release_variables may run on another thread
  TORCH_INTERNAL_ASSERT(grads.size() == 1);
  if (!grads[0].defined() || !task_should_compute_output(0)) {
    return {at::Tensor()};
  }
  const at::Tensor saved = indices.unpack();  // once: it may run a user's hook
  if (auto done = in_place(grads[0], saved)) {
    return {std::move(*done)};
  }
  return {
      formula()(grads[0], saved, num_weights, padding_idx, scale_grad_by_freq, sparse, coalesced)};
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
  args.collect(coalesced);
}

// The compiler's graph calls the formula later, on gradients whose shapes are not known here: what
// flows through while it is captured is a placeholder.
variable_list LookupNode::apply_with_saved(const variable_list& grads,
                                           torch::dynamo::autograd::SwapSavedVariables& saved) {
  using namespace torch::dynamo::autograd;
  saved.before(indices);
  saved.before(num_weights);
  saved.before(padding_idx);
  PackedArgs args;
  args.pack(indices.unpack());
  args.pack(num_weights);
  args.pack(padding_idx);
  args.pack(scale_grad_by_freq);
  args.pack(sparse);
  args.pack(coalesced);
  const auto call = [formula = formula()](const variable_list& inputs,
                                          const ivalue_list& packed) -> variable_list {
    if (!inputs[0].defined()) {
      return {at::Tensor()};
    }
    PackedArgs unpacked(packed);
    const auto saved_indices = unpacked.unpack<at::Tensor>();
    const auto rows = unpacked.unpack<c10::SymInt>();
    const auto padding_row = unpacked.unpack<c10::SymInt>();
    const auto scaled = unpacked.unpack<bool>();
    const auto is_sparse = unpacked.unpack<bool>();
    const auto is_coalesced = unpacked.unpack<bool>();
    return {formula(inputs[0], saved_indices, rows, padding_row, scaled, is_sparse, is_coalesced)};
  };
  const auto output_metadata = IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(
      get_input_metadata(next_edges()));
  const auto& compiler = getPyCompilerInterface();
  const auto bound =
      compiler->bind_function(saved.get_py_compiler(), name(), call,
                              {at::TensorType::get(), at::SymIntType::get(), at::SymIntType::get(),
                               at::BoolType::get(), at::BoolType::get(), at::BoolType::get()},
                              /*is_custom_function=*/true, /*is_traceable=*/true);
  auto result = compiler->call_function(saved.get_py_compiler(), "apply_functional", bound, grads,
                                        args.vec(), output_metadata);
  saved.after(indices);
  saved.after(num_weights);
  saved.after(padding_idx);
  return result;
}

}  // namespace embed_ext
