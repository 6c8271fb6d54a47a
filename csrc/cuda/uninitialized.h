// Memory that the kernels of one call write whole before anything reads it.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDACachingAllocator.h>

namespace embed_ext::cuda {

// at::empty() on the current device, but for one thing: under deterministic algorithms that fills
// the memory (torch.utils.deterministic.fill_uninitialized_memory), a launch and a pass over it
// each time. The allocator is the one that at::empty() asks, also where somebody has put another in
// the place of torch's own.
inline at::Tensor uninitialized(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::detail::empty_generic(sizes, c10::cuda::CUDACachingAllocator::get(),
                                   c10::DispatchKeySet(options.computeDispatchKey()),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace embed_ext::cuda
