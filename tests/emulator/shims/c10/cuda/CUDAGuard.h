#pragma once
#include <c10/core/Device.h>
#include <c10/cuda/CUDAMacros.h>

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::DeviceIndex /*device*/) {}
  explicit CUDAGuard(c10::Device /*device*/) {}
};
}  // namespace c10::cuda
