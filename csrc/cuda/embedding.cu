// Forward on CUDA: copies rows weight[indices[i]] to out[i]; see gather_rows.cu for the kernels.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "dispatch.cuh"
#include "gather_rows.cuh"
#include "index_check.cuh"
#include "uninitialized.h"

namespace embed_ext::cuda {
namespace {

constexpr const char* kOp = "embedding";

// weight [V, D] any strides, indices [...] -> [..., D]. The options only shape the gradient.
at::Tensor embedding(const at::Tensor& weight, const at::Tensor& indices, int64_t /*padding_idx*/,
                     bool /*scale_grad_by_freq*/, bool /*sparse*/, bool /*coalesced*/) {
  check_lookup(kOp, weight, indices);
  const c10::cuda::CUDAGuard device_guard(weight.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto errors = open_index_check(kOp, indices, weight.size(0));
  const int64_t width = weight.size(1);

  c10::SmallVector<int64_t, 5> sizes(indices.sizes());
  sizes.push_back(width);
  const at::Tensor out = uninitialized(sizes, weight.options());
  const auto index_tensor = indices.contiguous();
  if (width == 0) {
    launch_index_check(index_tensor, errors, stream);
  } else {
    with_index_pointer(index_tensor, [&](const auto* index) {
      // A single column has no neighbour to be away from: its stride means nothing.
      const int64_t column_stride = width == 1 ? 1 : weight.stride(1);
      using Index = std::decay_t<decltype(*index)>;
      launch_gather_rows(GatherTask<Index>{weight.const_data_ptr(), weight.stride(0), column_stride,
                                           index, out.mutable_data_ptr(), index_tensor.numel(),
                                           width, static_cast<int64_t>(weight.element_size())},
                         errors, stream);
    });
  }
  close_index_check(indices, stream);
  return out;
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding", TORCH_FN(embed_ext::cuda::embedding));
}
