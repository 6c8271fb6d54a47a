// The host's side of the index check: the slots, and who raises what is found in them.
#include "index_check.cuh"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>

#include "../checks.h"
#include "../index_check.h"
#include "dispatch.cuh"
#include "launch_math.h"

namespace embed_ext::cuda {
namespace {

// A thread an index.
template <class Index>
__global__ void check_indices(const Index* indices, int64_t num_indices, IndexErrors errors) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (i < num_indices && !errors.is_good(static_cast<int64_t>(indices[i]))) {
    errors.report(static_cast<int64_t>(indices[i]), i);
  }
}

using Slots = std::array<std::atomic<IndexErrorSlot*>, C10_COMPILE_TIME_MAX_GPUS>;

Slots& slots() {
  static Slots value{};
  return value;
}

std::mutex& slots_mutex() {
  static std::mutex value;
  return value;
}

// The current device's slot, at the same address for kernels, as all pinned memory is where torch
// runs. It lives as long as the process: a kernel may write to it at any time.
IndexErrorSlot* slot_of(c10::DeviceIndex device) {
  auto& entry = slots().at(device);
  if (auto* slot = entry.load(std::memory_order_acquire)) {
    return slot;
  }
  const std::lock_guard<std::mutex> lock(slots_mutex());
  if (auto* slot = entry.load(std::memory_order_acquire)) {
    return slot;
  }
  // The first call may come while a graph is captured, which otherwise forbids this allocation.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  void* memory = nullptr;
  C10_CUDA_CHECK(cudaHostAlloc(&memory, sizeof(IndexErrorSlot), cudaHostAllocMapped));
  auto* slot = new (memory) IndexErrorSlot{};
  entry.store(slot, std::memory_order_release);
  return slot;
}

// Empties the slot if a kernel has filled it.
std::optional<IndexErrorSlot> take_report(IndexErrorSlot* slot) {
  auto* state = static_cast<volatile unsigned*>(&slot->state);
  if (*state != IndexErrorSlot::kReady) {
    return std::nullopt;
  }
  const std::lock_guard<std::mutex> lock(slots_mutex());
  if (*state != IndexErrorSlot::kReady) {  // another thread has just raised it
    return std::nullopt;
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  const IndexErrorSlot report = *slot;
  std::atomic_thread_fence(std::memory_order_release);
  *state = IndexErrorSlot::kFree;
  return report;
}

// `sizes` is the shape of the indices, where it is known whose they are.
void raise_pending(c10::DeviceIndex device, at::OptionalIntArrayRef sizes) {
  auto* slot = slots().at(device).load(std::memory_order_acquire);
  if (slot == nullptr) {
    return;
  }
  if (const auto report = take_report(slot)) {
    raise_index_error(report->op, report->index, report->position, sizes, report->num_rows);
  }
}

}  // namespace

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

IndexErrors open_index_check(const char* op, const at::Tensor& indices, int64_t num_rows) {
  const auto device = c10::cuda::current_device();
  raise_pending(device, std::nullopt);
  if (num_rows == 0 && indices.numel() > 0) {
    const auto first = indices.reshape({-1}).narrow(0, 0, 1).to(at::kLong).item<int64_t>();
    raise_index_error(op, first, 0, indices.sizes(), num_rows);
  }
  if (index_check_mode() == IndexCheckMode::kNone) {
    return {nullptr, op, num_rows};
  }
  return {slot_of(device), op, num_rows};
}

void close_index_check(const at::Tensor& indices, cudaStream_t stream) {
  if (index_check_mode() != IndexCheckMode::kSync || is_capturing()) {
    return;
  }
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  raise_pending(c10::cuda::current_device(), indices.sizes());
}

void check_indices_first(const at::Tensor& indices, const IndexErrors& errors,
                         cudaStream_t stream) {
  if (index_check_mode() == IndexCheckMode::kSync && !is_capturing()) {
    launch_index_check(indices, errors, stream);
    close_index_check(indices, stream);
  }
}

void launch_index_check(const at::Tensor& indices, const IndexErrors& errors, cudaStream_t stream) {
  if (indices.numel() == 0) {
    return;
  }
  with_index_pointer(indices, [&](const auto* index) {
    check_indices<<<grid_blocks(indices.numel(), kBlockThreads), kBlockThreads, 0, stream>>>(
        index, indices.numel(), errors);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace embed_ext::cuda

namespace embed_ext {

void check_indices_now() {
  for (size_t device = 0; device < cuda::slots().size(); ++device) {
    if (cuda::slots()[device].load(std::memory_order_acquire) == nullptr) {
      continue;  // never used: it has no errors, and touching it would create a context
    }
    const c10::cuda::CUDAGuard device_guard(static_cast<c10::DeviceIndex>(device));
    TORCH_CHECK(!cuda::is_capturing(),
                "check_indices: the current stream is capturing a graph and cannot be waited for");
    C10_CUDA_CHECK(cudaDeviceSynchronize());
    cuda::raise_pending(static_cast<c10::DeviceIndex>(device), std::nullopt);
  }
}

}  // namespace embed_ext
