// Adam and AdamW on the CPU for the rows of a gradient: one pass over weight and moments together.
#include <torch/library.h>

#include "update.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_adam_";

// weight and exp_avg [V, D], exp_avg_sq [V, D] or [V], indices [N], values [N, D]
void embedding_adam_(const at::Tensor& weight, const at::Tensor& exp_avg,
                     const at::Tensor& exp_avg_sq, const at::Tensor& indices,
                     const at::Tensor& values, double lr, double beta1, double beta2, double eps,
                     double weight_decay, bool decoupled, int64_t step, bool maximize,
                     std::optional<int64_t> seed, bool coalesced) {
  check_update(kOp, weight, indices, values,
               {{"exp_avg", exp_avg, false}, {"exp_avg_sq", exp_avg_sq, true}}, seed);
  check_step(kOp, step);
  const RowGradient grad{indices, values, coalesced};
  with_update_types(weight.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    using Acc = decltype(accumulator);
    const auto gradient = seen_gradient<Acc>(maximize, decoupled ? 0 : weight_decay);
    const double kept = decoupled ? 1 - lr * weight_decay : 1;
    const auto rates = adam_rates<Acc>(lr, beta1, beta2, eps, kept, step);
    with_adam(gradient, rates, exp_avg, exp_avg_sq,
              [&](const auto& method) { update<T>(kOp, weight, grad, seed, method); });
  });
}

}  // namespace
}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) {
  m.impl("embedding_adam_", TORCH_FN(embed_ext::cpu::embedding_adam_));
}
