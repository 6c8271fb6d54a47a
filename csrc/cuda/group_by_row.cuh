// Brings the tokens that use the same row together, without the host waiting for anything.
//
//   indices        5  2  5  9  2     V = 6, ignored_row = -1; 9 is bad
//   row            2  2  5  5  6     6 = V: bad or ignored, always last
//   position       1  4  0  2  3     stable: within a row, in the order of occurrence
//   place          0  0  1  1  2  2  of each row among those in use, and at the end how many are
//
// All are uint32, which is half the traffic of int64; more rows or tokens are refused.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "index_errors.cuh"

namespace embed_ext::cuda {

// The tensors are int32, since few of torch's functions know unsigned ones; the kernels see uint32.
struct RowGroups {
  at::Tensor row;       // [N]
  at::Tensor position;  // [N]
};

// indices [N] contiguous, of any index type, N > 0. `cleared`, if there is any, is a uint8 tensor
// of whole vectors of 16 bytes that is filled with zeros on the way.
RowGroups group_by_row(const at::Tensor& indices, int64_t ignored_row, const IndexErrors& errors,
                       cudaStream_t stream, const at::Tensor& cleared = {});

// The positions [nnz] int64, ascending, of the indices [N] contiguous, N > 0, that are not
// ignored_row. The host waits for their number.
at::Tensor positions_except(const at::Tensor& indices, int64_t ignored_row, const char* op,
                            cudaStream_t stream);

// The places [N + 1] of sorted rows [N], of which those from errors.num_rows on are not in use.
at::Tensor places_of(const at::Tensor& row, const IndexErrors& errors, cudaStream_t stream);

inline uint32_t* as_uint32(const at::Tensor& tensor) {
  return static_cast<uint32_t*>(tensor.mutable_data_ptr());
}

}  // namespace embed_ext::cuda
