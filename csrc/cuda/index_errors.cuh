// The device side of the index check: torch-free, see index_check.cuh for the whole.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace embed_ext::cuda {

// In host memory, mapped into the device. `state` says who may write: kernels take a free slot,
// fill it and mark it ready; the host reads a ready slot and frees it.
struct IndexErrorSlot {
  enum State : unsigned { kFree = 0, kTaken = 1, kReady = 2 };
  static constexpr int64_t kNone = INT64_MIN;

  unsigned state;
  const char* op;  // the host's pointer, which kernels only pass on
  int64_t index;
  int64_t position;
  int64_t num_rows;
  int64_t before;  // the index before it, where it should be larger than that and is not; or kNone
};

// What a kernel needs to know. Without a slot bad indices are left alone, but not reported.
struct IndexErrors {
  IndexErrorSlot* slot;
  const char* op;
  int64_t num_rows;

  // One compare: a negative index is a huge one without its sign.
  __device__ bool is_good(int64_t index) const {
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(num_rows);
  }

  // Where indices have to ascend strictly. `before` is the one before it, kNone for the first.
  __device__ bool is_good_after(int64_t before, int64_t index) const {
    return is_good(index) && index > before;
  }
  __device__ void report_after(int64_t before, int64_t index, int64_t position) const {
    report(index, position, index > before ? IndexErrorSlot::kNone : before);
  }

  __device__ void report(int64_t index, int64_t position,
                         int64_t before = IndexErrorSlot::kNone) const {
    // The plain read first: when a million indices are bad, a million atomics on host memory would
    // crawl over the bus.
    if (slot == nullptr ||
        *static_cast<volatile unsigned*>(&slot->state) != IndexErrorSlot::kFree ||
        atomicCAS(&slot->state, IndexErrorSlot::kFree, IndexErrorSlot::kTaken) !=
            IndexErrorSlot::kFree) {
      return;
    }
    slot->op = op;
    slot->index = index;
    slot->position = position;
    slot->num_rows = num_rows;
    slot->before = before;
    __threadfence_system();  // the host sees the fields before it sees the state
    *static_cast<volatile unsigned*>(&slot->state) = IndexErrorSlot::kReady;
  }
};

}  // namespace embed_ext::cuda
