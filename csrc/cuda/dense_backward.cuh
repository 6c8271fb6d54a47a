// What the two dense backward algorithms share: the task. Torch-free kernels, thin launchers.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "index_errors.cuh"

namespace embed_ext::cuda {

struct DenseBackwardTask {
  at::Tensor grad;     // [N, D] float32, float64, bfloat16 or float16, unit inner stride, N, D > 0
  at::Tensor indices;  // [N] contiguous, any index type
  at::Tensor out;      // [V, D] contiguous, of grad's dtype, not yet written to, V > 0
  int64_t padding_idx;
  bool scale_grad_by_freq;  // only add_segments() can
};

// Fills with zeros, then adds with atomics. float32 and float64 only.
void add_atomically(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream);

// Sorts, then writes every row of `out` once. The same bits on every run.
void add_segments(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream);

}  // namespace embed_ext::cuda
