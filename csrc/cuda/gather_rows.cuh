// The row gather: what the forward is, and half of the sparse backward.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "index_errors.cuh"

namespace embed_ext::cuda {

// out[i, :] = table[indices[i], :], or zeros where the index is bad. Bytes are copied as they are,
// so that only the size of an element matters, not its dtype.
template <class Index>
struct GatherTask {
  const void* table;                  // [V, D]
  int64_t row_stride, column_stride;  // of the table, in elements
  const Index* indices;               // [N] contiguous
  void* out;                          // [N, D] contiguous
  int64_t num_indices;                // N
  int64_t width;                      // D > 0
  int64_t element_bytes;              // 1, 2, 4, 8 or 16
};

// Index: any of the seven index types.
template <class Index>
void launch_gather_rows(const GatherTask<Index>& task, const IndexErrors& errors,
                        cudaStream_t stream);

}  // namespace embed_ext::cuda
