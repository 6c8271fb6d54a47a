// Adagrad on the CPU for the rows of a gradient: one pass over weight and sum together.
#include <torch/library.h>

#include "update.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding_adagrad_";

// weight [V, D], sum [V, D] or [V], indices [N], values [N, D]
void embedding_adagrad_(const at::Tensor& weight, const at::Tensor& sum, const at::Tensor& indices,
                        const at::Tensor& values, double lr, double weight_decay, double eps,
                        bool maximize, std::optional<int64_t> seed, bool coalesced) {
  check_update(kOp, weight, indices, values, {{"sum", sum, true}}, seed);
  const RowGradient grad{indices, values, coalesced};
  with_update_types(weight.scalar_type(), [&](auto element, auto accumulator) {
    using T = decltype(element);
    const auto gradient = seen_gradient<decltype(accumulator)>(maximize, weight_decay);
    with_adagrad(gradient, sum, lr, eps,
                 [&](const auto& method) { update<T>(kOp, weight, grad, seed, method); });
  });
}

}  // namespace
}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) {
  m.impl("embedding_adagrad_", TORCH_FN(embed_ext::cpu::embedding_adagrad_));
}
