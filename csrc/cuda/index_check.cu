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
#include <vector>

#include "../checks.h"
#include "../index_check.h"
#include "../update_checks.h"
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

__global__ void check_ascending(const int64_t* indices, int64_t num_indices, IndexErrors errors) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (i < num_indices) {
    const int64_t before = i == 0 ? IndexErrorSlot::kNone : indices[i - 1];
    if (!errors.is_good_after(before, indices[i])) {
      errors.report_after(before, indices[i], i);
    }
  }
}

std::mutex& slots_mutex() {
  static std::mutex value;
  return value;
}

// At the same address for kernels, as all pinned memory is where torch runs. It lives as long as
// the process: a kernel may write to it at any time.
IndexErrorSlot* new_slot() {
  // The first call may come while a graph is captured, which otherwise forbids this allocation.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  void* memory = nullptr;
  C10_CUDA_CHECK(
      cudaHostAlloc(&memory, sizeof(IndexErrorSlot), cudaHostAllocMapped | cudaHostAllocPortable));
  return new (memory) IndexErrorSlot{};
}

// The slots that all calls of a device share, but for those that wait for their own.
using Slots = std::array<std::atomic<IndexErrorSlot*>, C10_COMPILE_TIME_MAX_GPUS>;

Slots& slots() {
  static Slots value{};
  return value;
}

IndexErrorSlot* slot_of(c10::DeviceIndex device) {
  auto& entry = slots().at(device);
  if (auto* slot = entry.load(std::memory_order_acquire)) {
    return slot;
  }
  const std::lock_guard<std::mutex> lock(slots_mutex());
  if (entry.load(std::memory_order_relaxed) == nullptr) {
    entry.store(new_slot(), std::memory_order_release);
  }
  return entry.load(std::memory_order_relaxed);
}

// The slot of the calls that wait: one a thread, which makes one call at a time, and so whatever is
// in it when the stream has been waited for is that call's. Any device can write to pinned memory.
class OwnSlot {
 public:
  ~OwnSlot() {
    if (slot_ != nullptr && !in_use_) {
      const std::lock_guard<std::mutex> lock(slots_mutex());
      unused().push_back(slot_);
    }
  }

  IndexErrorSlot* begin() {
    if (slot_ == nullptr) {
      slot_ = take_unused();
    }
    in_use_ = true;
    return slot_;
  }

  // For a call that begins and finds that the one before failed half-way: it has left kernels
  // behind that may yet write, so its slot is not used again.
  void give_up() {
    slot_ = in_use_ ? nullptr : slot_;
    in_use_ = false;
  }

  void end() { in_use_ = false; }

  // The slot of the call between begin() and end(), else null.
  IndexErrorSlot* current() const { return in_use_ ? slot_ : nullptr; }

 private:
  static std::vector<IndexErrorSlot*>& unused() {
    static auto* value = new std::vector<IndexErrorSlot*>;  // threads may end after statics
    return *value;
  }

  static IndexErrorSlot* take_unused() {
    const std::lock_guard<std::mutex> lock(slots_mutex());
    if (unused().empty()) {
      return new_slot();
    }
    auto* slot = unused().back();
    unused().pop_back();
    return slot;
  }

  IndexErrorSlot* slot_ = nullptr;
  bool in_use_ = false;
};

OwnSlot& own_slot() {
  static thread_local OwnSlot value;
  return value;
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

[[noreturn]] void raise(const IndexErrorSlot& report, at::OptionalIntArrayRef indices_sizes) {
  if (report.before != IndexErrorSlot::kNone) {
    raise_not_ascending(report.op, report.index, report.before, report.position);
  }
  raise_index_error(report.op, report.index, report.position, indices_sizes, report.num_rows);
}

// Raises what a call that did not wait has left; the shape of its indices is not known any more.
void raise_pending(c10::DeviceIndex device) {
  auto* slot = slots().at(device).load(std::memory_order_acquire);
  if (slot == nullptr) {
    return;
  }
  if (const auto report = take_report(slot)) {
    raise(*report, std::nullopt);
  }
}

// Waits for `stream` and raises what the call that owns `slot` has left there.
void raise_own(IndexErrorSlot* slot, const at::Tensor& indices, cudaStream_t stream) {
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  if (const auto report = take_report(slot)) {
    own_slot().end();
    raise(*report, indices.sizes());
  }
}

}  // namespace

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

IndexErrors open_index_check(const char* op, const at::Tensor& indices, int64_t num_rows) {
  own_slot().give_up();
  const auto device = c10::cuda::current_device();
  const auto mode = index_check_mode();
  if (mode != IndexCheckMode::kNone) {
    raise_pending(device);
  }
  if (num_rows == 0 && indices.numel() > 0) {
    const auto first = indices.reshape({-1}).narrow(0, 0, 1).to(at::kLong).item<int64_t>();
    raise_index_error(op, first, 0, indices.sizes(), num_rows);
  }
  if (mode == IndexCheckMode::kNone) {
    return {nullptr, op, num_rows};
  }
  const bool waits = mode == IndexCheckMode::kSync && !is_capturing();
  return {waits ? own_slot().begin() : slot_of(device), op, num_rows};
}

void close_index_check(const at::Tensor& indices, cudaStream_t stream) {
  if (auto* slot = own_slot().current()) {
    raise_own(slot, indices, stream);
    own_slot().end();
  }
}

void check_indices_first(const at::Tensor& indices, const IndexErrors& errors,
                         cudaStream_t stream) {
  if (auto* slot = own_slot().current()) {
    launch_index_check(indices, errors, stream);
    raise_own(slot, indices, stream);
  }
}

void check_ascending_first(const at::Tensor& indices, const IndexErrors& errors,
                           cudaStream_t stream) {
  if (auto* slot = own_slot().current()) {
    launch_ascending_check(indices, errors, stream);
    raise_own(slot, indices, stream);
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

void launch_ascending_check(const at::Tensor& indices, const IndexErrors& errors,
                            cudaStream_t stream) {
  if (indices.numel() > 0) {
    check_ascending<<<grid_blocks(indices.numel(), kBlockThreads), kBlockThreads, 0, stream>>>(
        indices.const_data_ptr<int64_t>(), indices.numel(), errors);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
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
    cuda::raise_pending(static_cast<c10::DeviceIndex>(device));
  }
}

}  // namespace embed_ext
