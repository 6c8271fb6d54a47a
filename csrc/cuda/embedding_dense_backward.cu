// Dense gradient on CUDA: picks the algorithm (dense_backward_policy.h) and launches it.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "dense_backward.cuh"
#include "dense_backward_policy.h"
#include "index_check.cuh"

namespace embed_ext::cuda {
namespace {

constexpr const char* kOp = "embedding_dense_backward";

// grad_output [..., D] -> [N, D] with its elements side by side
at::Tensor as_rows(const at::Tensor& grad_output, int64_t num_indices) {
  const auto grad = grad_output.reshape({num_indices, grad_output.size(-1)});
  return grad.stride(1) == 1 ? grad : grad.contiguous();
}

// task.out is complete after this, whatever the task holds.
void run(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream) {
  if (task.out.numel() == 0) {
    return launch_index_check(task.indices, errors, stream);
  }
  if (task.indices.numel() == 0) {
    C10_CUDA_CHECK(cudaMemsetAsync(task.out.mutable_data_ptr(), 0, task.out.nbytes(), stream));
    return;
  }
  const auto type = task.grad.scalar_type();
  const auto algorithm = choose_dense_backward(
      {task.indices.numel(), task.out.size(0), type == at::kHalf || type == at::kBFloat16,
       task.scale_grad_by_freq, at::globalContext().deterministicAlgorithms()});
  algorithm == DenseBackward::kAtomic ? add_atomically(task, errors, stream)
                                      : add_segments(task, errors, stream);
}

// grad_output [..., D], indices [...] -> [num_weights, D]
at::Tensor embedding_dense_backward(const at::Tensor& grad_output, const at::Tensor& indices,
                                    int64_t num_weights, int64_t padding_idx,
                                    bool scale_grad_by_freq) {
  check_grad(kOp, grad_output, indices, num_weights);
  if (grad_output.is_complex()) {  // a sum of complex rows is a sum of real rows twice as wide
    const auto real = at::view_as_real(grad_output.resolve_conj()).flatten(-2);
    const auto out =
        embedding_dense_backward(real, indices, num_weights, padding_idx, scale_grad_by_freq);
    return at::view_as_complex(out.view({num_weights, grad_output.size(-1), 2}));
  }
  const c10::cuda::CUDAGuard device_guard(grad_output.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto errors = open_index_check(kOp, indices, num_weights);
  const auto grad = as_rows(grad_output, indices.numel());
  const auto out = at::empty({num_weights, grad.size(1)}, grad.options());
  run({grad, indices.contiguous().view(-1), out, padding_idx, scale_grad_by_freq}, errors, stream);
  close_index_check(indices, stream);
  return out;
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding_dense_backward", TORCH_FN(embed_ext::cuda::embedding_dense_backward));
}
