// d embedding / d weight: the gradient of a gather is a scatter-add, dense or sparse.
//
// In an ordinary backward it goes straight to where it is kept: the sum that other uses of the
// table have begun, a .grad that is there already, the memory of the gradient before (KeptGradient)
// or other memory, since for a small table the dispatcher would take longer than the sum.
#include <ATen/record_function.h>
#include <torch/library.h>

#include "../dense_gradient.h"
#include "../kept_gradient.h"
#include "accumulate.h"
#include "leaf.h"
#include "node.h"

namespace embed_ext {
namespace {

// grad [..., D], indices [...] -> [V, D]
at::Tensor scatter_add(const at::Tensor& grad, const at::Tensor& indices,
                       const c10::SymInt& num_weights, const c10::SymInt& padding_idx,
                       bool scale_grad_by_freq, bool sparse, bool coalesced) {
  if (sparse) {
    return sparse_backward_op().call(grad, indices, num_weights, padding_idx, scale_grad_by_freq,
                                     coalesced);
  }
  return dense_backward_op().call(grad, indices, num_weights, padding_idx, scale_grad_by_freq);
}

constexpr const char* kBackward = "embedding_dense_backward";
constexpr const char* kRecorded = "embed_ext::embedding_dense_backward";  // for profilers
constexpr const char* kSparseRecorded = "embed_ext::embedding_sparse_backward";

// Whether nobody but the node that is running has this gradient [..., D]: no hook that has seen it,
// no caller of backward(), no other tensor of its memory but the one that it is a view of.
bool is_ours_alone(const at::Tensor& grad_output) {
  if (grad_output.use_count() != 1 || !grad_output.is_contiguous()) {
    return false;
  }
  if (!grad_output.is_view()) {
    return grad_output.storage().use_count() == 1;
  }
  return grad_output._base().use_count() == 1 && grad_output.storage().use_count() == 2;
}

struct EmbeddingBackward : public LookupNode {
  std::shared_ptr<KeptGradient> kept;

  std::string name() const override { return "embed_ext::EmbeddingBackward"; }
  Formula formula() const override { return &scatter_add; }
  std::optional<at::Tensor> in_place(const at::Tensor& grad_output,
                                     const at::Tensor& saved_indices) override;
  std::optional<at::Tensor> keep_entries(const at::Tensor& grad_output,
                                         const at::Tensor& saved_indices) const;
};

// What embedding_sparse_backward returns for an entry a token, where it need not copy grad_output
// [..., D] since nobody will miss it: a sparse gradient is then made without touching a row.
std::optional<at::Tensor> EmbeddingBackward::keep_entries(const at::Tensor& grad_output,
                                                          const at::Tensor& saved_indices) const {
  if (coalesced || scale_grad_by_freq || padding_idx.expect_int() >= 0 ||
      !is_ours_alone(grad_output)) {
    return std::nullopt;
  }
  RECORD_FUNCTION(kSparseRecorded, {});
  const int64_t count = saved_indices.numel(), width = grad_output.size(-1);
  const auto rows = saved_indices.reshape({1, count})
                        .to(at::kLong, /*non_blocking=*/false,
                            /*copy=*/true);
  return at::_sparse_coo_tensor_unsafe(rows, grad_output.view({count, width}),
                                       {num_weights.expect_int(), width},
                                       grad_output.options().layout(at::kSparse));
}

// grad_output [..., D], saved_indices [...]. The result is undefined if it was added to what is
// there.
std::optional<at::Tensor> EmbeddingBackward::in_place(const at::Tensor& grad_output,
                                                      const at::Tensor& saved_indices) {
  if (!is_plain_call(grad_output) || !is_plain_call(saved_indices) ||
      num_weights.is_heap_allocated() || padding_idx.is_heap_allocated()) {
    return std::nullopt;
  }
  if (sparse) {
    return keep_entries(grad_output, saved_indices);
  }
  if (grad_output.is_complex()) {
    return std::nullopt;
  }
  const auto* const kernels =
      dense_gradient_kernels[static_cast<size_t>(grad_output.device().type())];
  if (kernels == nullptr) {
    return std::nullopt;
  }
  const DenseGradient task{grad_output, saved_indices, num_weights.expect_int(),
                           padding_idx.expect_int(), scale_grad_by_freq};
  if (const SumOnItsWay sum(*this, grad_output, saved_indices, task.num_weights, kept.get()); sum) {
    RECORD_FUNCTION(kRecorded, {});
    kernels->add(kBackward, task, sum.tensor(), kept.get());
    return at::Tensor();
  }
  if (const GradToAddTo existing(*this, grad_output, saved_indices, task.num_weights); existing) {
    RECORD_FUNCTION(kRecorded, {});
    kernels->add(kBackward, task, existing.tensor(), kept.get());
    return at::Tensor();
  }
  RECORD_FUNCTION(kRecorded, {});
  return kernels->make(kBackward, task, kept.get());
}

// weight [V, D], indices [...] -> [..., D]
at::Tensor embedding(c10::DispatchKeySet keys, const at::Tensor& weight, const at::Tensor& indices,
                     c10::SymInt padding_idx, bool scale_grad_by_freq, bool sparse,
                     bool coalesced) {
  // A weight of another rank is turned down below, by the check that every device shares.
  const auto num_weights = weight.dim() == 2 ? weight.sym_size(0) : c10::SymInt(0);
  const auto kept = KeptGradientScope::take();
  auto out = record_linear<EmbeddingBackward>(
      weight, indices, num_weights, padding_idx, scale_grad_by_freq, sparse,
      [&](const at::Tensor& table) {
        return embedding_op().redispatch(keys & c10::after_autograd_keyset, table, indices,
                                         padding_idx, scale_grad_by_freq, sparse, coalesced);
      },
      [&](const at::Tensor& tangent) {
        return embedding_op().call(tangent, indices, padding_idx, scale_grad_by_freq, sparse,
                                   coalesced);
      });
  if (kept != nullptr || coalesced) {
    if (auto* node = dynamic_cast<EmbeddingBackward*>(out.grad_fn().get())) {
      node->kept = kept;
      node->coalesced = coalesced;
    }
  }
  return out;
}

}  // namespace
}  // namespace embed_ext

TORCH_LIBRARY_IMPL(embed_ext, Autograd, m) { m.impl("embedding", TORCH_FN(embed_ext::embedding)); }
