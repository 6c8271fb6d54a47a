// SGD on CUDA for the rows of a gradient; see update_rows.cuh for the kernel.
#include <torch/library.h>

#include "../update_checks.h"
#include "update_rows.cuh"

namespace embed_ext::cuda {
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
  update(kOp, weight, {indices, values, coalesced}, seed, [&](auto accumulator, const auto& f) {
    using Acc = typename decltype(accumulator)::type;
    const auto gradient = seen_gradient<Acc>(maximize, weight_decay);
    with_sgd(gradient, buffer, lr, momentum, dampening, nesterov, f);
  });
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding_sgd_", TORCH_FN(embed_ext::cuda::embedding_sgd_));
}
