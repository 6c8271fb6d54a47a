// What the dense backward algorithms share, and who picks one of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>
#include <cuda_runtime_api.h>

#include "../dense_gradient.h"
#include "group_by_row.cuh"
#include "index_errors.cuh"
#include "row_notes.cuh"

namespace embed_ext::cuda {

// What becomes of the rows of `out`.
enum class RowsOfOut {
  kAllWritten,   // nothing is known of what they hold: the sums, and zeros everywhere else
  kUsedWritten,  // all but those in use stay as they are; those may be zero or not be written yet
  kAdded,        // the sums are added to those in use, rounded once
};

struct DenseBackwardTask {
  at::Tensor grad;     // [N, D] float32, float64, bfloat16 or float16, unit inner stride, N, D > 0
  at::Tensor indices;  // [N] contiguous, any index type
  at::Tensor out;  // [V, D] of grad's dtype or float32, unit inner stride, contiguous unless kAdded
  RowsOfOut rows;
  int64_t padding_idx;
  bool scale_grad_by_freq;  // only add_segments() can
};

// Atomic adds, after a fill with zeros where that is needed. `out` is float32 or float64.
void add_atomically(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream);

// Sorts, then writes each row once. The same bits on every run.
void add_segments(const DenseBackwardTask& task, const IndexErrors& errors, cudaStream_t stream);

// The same for tokens that are sorted already, by the rows of `out`. Rows that no token has are
// cleared if it is noted which are in use, else left alone.
void add_segments(const DenseBackwardTask& task, const RowGroups& groups, const RowNotes& notes,
                  cudaStream_t stream);

// The table that `table_of` returns once everything is checked that is checked beforehand, with the
// gradient in it. `task` has passed check_grad(); grad_output is of a real dtype.
at::Tensor sum_gradient(const char* op, const DenseGradient& task, RowsOfOut rows,
                        c10::function_ref<at::Tensor()> table_of);

// grad_output [..., D] -> [N, D] with the elements of a row side by side
inline at::Tensor as_rows(const at::Tensor& grad_output, int64_t num_indices) {
  const auto grad = grad_output.reshape({num_indices, grad_output.size(-1)});
  return grad.stride(1) == 1 ? grad : grad.contiguous();
}

}  // namespace embed_ext::cuda
