// The sum behind every dense gradient on CUDA, wherever it is to go: picks the algorithm
// (dense_backward_policy.h) and launches it.
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../checks.h"
#include "dense_backward.cuh"
#include "dense_backward_policy.h"
#include "index_check.cuh"
#include "uninitialized.h"

namespace embed_ext::cuda {
namespace {

// task.out is complete after this, whatever the task holds.
void run(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream) {
  if (task.out.numel() == 0) {
    return launch_index_check(task.indices, errors, stream);
  }
  if (task.indices.numel() == 0) {
    if (task.rows == RowsOfOut::kAllWritten) {
      C10_CUDA_CHECK(cudaMemsetAsync(task.out.mutable_data_ptr(), 0, task.out.nbytes(), stream));
    }
    return;
  }
  const auto type = task.out.scalar_type();
  const auto algorithm = choose_dense_backward(
      {task.indices.numel(), task.out.size(0), type == at::kHalf || type == at::kBFloat16,
       task.scale_grad_by_freq, at::globalContext().deterministicAlgorithms()});
  switch (algorithm) {
    case DenseBackward::kAtomic:
      return add_atomically(task, errors, stream);
    case DenseBackward::kSegments:
      return add_segments(task, errors, stream);
  }
}

// The rows that a kept gradient is to clear, as nobody else will change them.
UsedRows used_rows(const at::Tensor& indices) {
  return {{}, {indices.reshape({-1}).to(at::kLong, /*non_blocking=*/false, /*copy=*/true)}};
}

}  // namespace

at::Tensor sum_gradient(const char* op, const DenseGradient& task, RowsOfOut rows,
                        c10::function_ref<at::Tensor()> table_of) {
  const c10::cuda::CUDAGuard device_guard(task.grad_output.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto errors = open_index_check(op, task.indices, task.num_weights);
  const auto grad = as_rows(task.grad_output, task.indices.numel());
  const auto indices = task.indices.contiguous();
  if (rows == RowsOfOut::kAdded) {
    check_indices_first(indices, errors, stream);
  }
  const at::Tensor table = table_of();
  run({grad, indices.view(-1), table, rows, task.padding_idx, task.scale_grad_by_freq}, errors,
      stream);
  close_index_check(task.indices, stream);
  return table;
}

namespace {

// While a CUDA graph is captured, in memory of the graph's own, whatever is kept: which rows a
// replay writes is not known here.
at::Tensor make(const char* op, const DenseGradient& task, KeptGradient* kept) {
  check_grad(op, task.grad_output, task.indices, task.num_weights);
  const int64_t width = task.grad_output.size(-1);
  const auto options = task.grad_output.options();
  if (kept == nullptr || is_capturing()) {
    return sum_gradient(op, task, RowsOfOut::kAllWritten,
                        [&] { return uninitialized({task.num_weights, width}, options); });
  }
  return sum_gradient(op, task, RowsOfOut::kUsedWritten, [&] {
    return kept->zeros(task.num_weights, width, used_rows(task.indices), options);
  });
}

void add(const char* op, const DenseGradient& task, const at::Tensor& table, KeptGradient* kept) {
  check_grad_add(op, table, task.grad_output, task.indices);
  sum_gradient(op, task, RowsOfOut::kAdded, [&] {
    if (kept != nullptr && !is_capturing()) {
      kept->bump_version(table, used_rows(task.indices));
    } else {
      table.unsafeGetTensorImpl()->bump_version();
    }
    return table;
  });
}

const DenseGradientKernels kernels{&make, &add};
[[maybe_unused]] const bool registered = register_dense_gradient(c10::kCUDA, kernels);

}  // namespace
}  // namespace embed_ext::cuda
