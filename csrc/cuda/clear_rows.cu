// Zeros in the rows that an earlier gradient wrote: what a kept gradient pays in place of a fill of
// the whole table.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../kept_gradient.h"
#include "launch_math.h"
#include "vector.cuh"

namespace embed_ext::cuda {
namespace {

// A thread a vector of a named row, so that stores are contiguous along it. A row that is named
// more than once is cleared as often. Rows beyond the table were never written.
template <class Vector>
__global__ void __launch_bounds__(kBlockThreads)
    clear_vectors(Vector* table, int64_t num_rows, const int64_t* rows, int64_t count,
                  Divider row_vectors) {
  const int64_t item = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  const int64_t i = row_vectors.quotient(item);
  if (i >= count) {
    return;
  }
  const int64_t row = __ldg(rows + i);
  if (row >= 0 && row < num_rows) {
    const int64_t vector = item - i * row_vectors.divisor();
    store_raw(table + row * row_vectors.divisor() + vector, Vector{});
  }
}

template <int kBytes>
void launch(const at::Tensor& grad, const at::Tensor& rows, int64_t row_bytes,
            cudaStream_t stream) {
  using Vector = typename RawVector<kBytes>::type;
  const Divider row_vectors(row_bytes / kBytes);
  const auto blocks = grid_blocks(rows.numel() * row_vectors.divisor(), kBlockThreads);
  clear_vectors<<<blocks, kBlockThreads, 0, stream>>>(static_cast<Vector*>(grad.mutable_data_ptr()),
                                                      grad.size(0), rows.const_data_ptr<int64_t>(),
                                                      rows.numel(), row_vectors);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// rows [N] int64 of grad [V, D] contiguous; rows that grad does not have are passed over.
void clear_rows(const at::Tensor& grad, const at::Tensor& rows) {
  if (rows.numel() == 0 || grad.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAGuard device_guard(grad.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t row_bytes = grad.size(1) * static_cast<int64_t>(grad.element_size());
  switch (vector_bytes({address(grad.const_data_ptr()), static_cast<uint64_t>(row_bytes)})) {
    case 16:
      return launch<16>(grad, rows, row_bytes, stream);
    case 8:
      return launch<8>(grad, rows, row_bytes, stream);
    case 4:
      return launch<4>(grad, rows, row_bytes, stream);
    default:  // no gradient has elements of one byte
      return launch<2>(grad, rows, row_bytes, stream);
  }
}

// A search waits for the device, and one of a few rows as long as one of all.
const KeptMemory memory{[](int64_t num_rows, int64_t width, const at::TensorOptions& options) {
                          return at::zeros({num_rows, width}, options);
                        },
                        [](const at::Tensor& grad) { grad.zero_(); },
                        [](const at::Tensor& grad, const UsedRows& rows) {
                          for (const auto& of_one_backward : rows.on_device) {
                            clear_rows(grad, of_one_backward);
                          }
                        },
                        [](const at::Tensor& grad) {
                          const auto rows = grad.ne(0).any(1).nonzero();
                          return rows.numel() > 0 ? rows.select(0, 0).item<int64_t>() : int64_t{-1};
                        },
                        /*first_nonzero_row_of_sample=*/nullptr};
[[maybe_unused]] const bool registered = register_kept_memory(c10::kCUDA, memory);

}  // namespace
}  // namespace embed_ext::cuda
