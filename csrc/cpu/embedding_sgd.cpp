// SGD on the CPU for the rows of a gradient: one pass over weight and momentum_buffer together.
#include <torch/library.h>

#include "update.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_sgd_";

// weight and momentum_buffer [V, D], indices [N], values [N, D]
void embedding_sgd_(const at::Tensor& weight, const std::optional<at::Tensor>& momentum_buffer,
                    const at::Tensor& indices, const at::Tensor& values, double lr,
                    double weight_decay, double momentum, double dampening, bool nesterov,
                    bool maximize, std::optional<int64_t> seed, bool coalesced) {
  const auto buffer = momentum_buffer.value_or(at::Tensor());
  check_update(kOp, weight, indices, values, {{"momentum_buffer", buffer, false}}, seed);
  check_momentum(kOp, buffer, momentum);
  const RowGradient grad{indices, values, coalesced};
  with_update_types(weight.scalar_type(), [&](auto element, auto sum) {
    using T = decltype(element);
    const auto gradient = seen_gradient<decltype(sum)>(maximize, weight_decay);
    with_sgd(gradient, buffer, lr, momentum, dampening, nesterov,
             [&](const auto& method) { update<T>(kOp, weight, grad, seed, method); });
  });
}

}  // namespace
}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) {
  m.impl("embedding_sgd_", TORCH_FN(embed_ext::cpu::embedding_sgd_));
}
