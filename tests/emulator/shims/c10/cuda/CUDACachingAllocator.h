// In place of torch's: the emulated device's memory is the CPU's.
#pragma once

#include <c10/core/Allocator.h>

namespace c10::cuda::CUDACachingAllocator {

inline c10::Allocator* get() { return c10::GetAllocator(c10::kCPU); }

}  // namespace c10::cuda::CUDACachingAllocator
