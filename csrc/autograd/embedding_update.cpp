// An optimizer's update of some rows has no derivative: it is refused where autograd would have to
// record it, and raises the versions of what it writes, so that a saved table is caught.
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

namespace embed_ext {
namespace {

using c10::OperatorHandle, torch::jit::Stack;

constexpr const char* kUpdates[] = {"embedding_sgd_", "embedding_adagrad_", "embedding_adam_"};

// Calls f(tensor, is_written) for the tensors among the arguments on the stack.
template <class F>
void for_each_tensor(const OperatorHandle& op, const Stack& stack, const F& f) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack.size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = stack[first + i];
    if (value.isTensor() && value.toTensor().defined()) {
      const auto* alias = arguments[i].alias_info();
      f(value.toTensor(), alias != nullptr && alias->isWrite());
    }
  }
}

void update_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  using namespace torch::autograd;
  for_each_tensor(op, *stack, [&](const at::Tensor& tensor, bool is_written) {
    const bool recording = compute_requires_grad(tensor);
    if (is_written) {
      check_inplace(tensor, recording);
    }
    TORCH_CHECK(!recording && !isFwGradDefined(tensor), op.schema().operator_name().name,
                ": has no derivative; call it under torch.no_grad(), on tensors without tangents");
  });
  at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

void update_inplace(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  std::vector<at::Tensor> written;
  for_each_tensor(op, *stack, [&](const at::Tensor& tensor, bool is_written) {
    if (is_written) {
      written.push_back(tensor);
    }
  });
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const auto& tensor : written) {
    torch::autograd::increment_version(tensor);
  }
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Autograd, m) {
  for (const char* op : embed_ext::kUpdates) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&embed_ext::update_autograd>());
  }
}

TORCH_LIBRARY_IMPL(embed_ext, ADInplaceOrView, m) {
  for (const char* op : embed_ext::kUpdates) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&embed_ext::update_inplace>());
  }
}
