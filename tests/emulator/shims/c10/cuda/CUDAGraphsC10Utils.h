#pragma once
#include <c10/cuda/CUDAStream.h>

// No graph is ever captured here.
namespace c10::cuda {
struct CUDAStreamCaptureModeGuard {
  explicit CUDAStreamCaptureModeGuard(cudaStreamCaptureMode /*mode*/) {}
};
enum class CaptureStatus { None, Active };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return CaptureStatus::None; }
}  // namespace c10::cuda
