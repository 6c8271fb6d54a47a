// Adagrad on CUDA for the rows of a gradient; see update_rows.cuh for the kernel.
#include <torch/library.h>

#include "../update_checks.h"
#include "update_rows.cuh"

namespace embed_ext::cuda {
namespace {

constexpr const char* kOp = "embedding_adagrad_";

// weight [V, D], sum [V, D] or [V], indices [N], values [N, D]
void embedding_adagrad_(const at::Tensor& weight, const at::Tensor& sum, const at::Tensor& indices,
                        const at::Tensor& values, double lr, double weight_decay, double eps,
                        bool maximize, std::optional<int64_t> seed, bool coalesced) {
  check_update(kOp, weight, indices, values, {{"sum", sum, true}}, seed);
  update(kOp, weight, {indices, values, coalesced}, seed, [&](auto accumulator, const auto& f) {
    using Acc = typename decltype(accumulator)::type;
    with_adagrad(seen_gradient<Acc>(maximize, weight_decay), sum, lr, eps, f);
  });
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding_adagrad_", TORCH_FN(embed_ext::cuda::embedding_adagrad_));
}
