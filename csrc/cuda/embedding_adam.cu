// Adam and AdamW on CUDA for the rows of a gradient; see update_rows.cuh for the kernel.
#include <torch/library.h>

#include "../update_checks.h"
#include "update_rows.cuh"

namespace embed_ext::cuda {
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
  update(kOp, weight, {indices, values, coalesced}, seed, [&](auto accumulator, const auto& f) {
    using Acc = typename decltype(accumulator)::type;
    const auto gradient = seen_gradient<Acc>(maximize, decoupled ? 0 : weight_decay);
    const double kept = decoupled ? 1 - lr * weight_decay : 1;
    with_adam(gradient, adam_rates<Acc>(lr, beta1, beta2, eps, kept, step), exp_avg, exp_avg_sq, f);
  });
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding_adam_", TORCH_FN(embed_ext::cuda::embedding_adam_));
}
