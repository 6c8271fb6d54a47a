// Threads that access the same memory in no order.
#include "mistakes.h"

namespace {

constexpr int kThreads = 64;

// A block's numbers the other way round; without the barrier a thread may read what is not there.
__global__ void reverse_block(int* out, const int* in, bool wrong) {
  __shared__ int numbers[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  numbers[i] = in[i];
  if (!wrong) {
    __syncthreads();
  }
  out[i] = numbers[kThreads - 1 - i];
}

// The same within each warp, for which a __syncwarp is enough.
__global__ void reverse_warps(int* out, const int* in, bool wrong) {
  __shared__ int numbers[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  numbers[i] = in[i];
  if (!wrong) {
    __syncwarp();
  }
  out[i] = numbers[i ^ 31];
}

// The sum of all numbers in one place: plain additions of several threads lose some.
__global__ void sum_all(float* sum, const float* in, bool wrong) {
  const float value = in[blockIdx.x * kThreads + threadIdx.x];
  if (wrong) {
    *sum += value;
  } else {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;"
                 :
                 : "l"(__cvta_generic_to_global(sum)), "f"(value)
                 : "memory");
  }
}

// Two blocks of one launch: a barrier of a block puts nothing in order with the other one.
__global__ void pass_on(int* numbers, bool wrong) {
  if (blockIdx.x == 0) {
    numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  }
  __syncthreads();
  if (wrong ? blockIdx.x == 1 : blockIdx.x == 0) {
    numbers[kThreads + threadIdx.x] = numbers[kThreads - 1 - threadIdx.x];
  }
}

// Several threads write one place: all the same, or each its own number.
__global__ void write_one_place(int* out, bool wrong) {
  *out = wrong ? static_cast<int>(threadIdx.x) + 1 : 1;
}

// A report of which there is one place: who finds it taken has to leave it alone.
struct Slot {
  unsigned state;
  int thread;
};

__global__ void report_once(Slot* slot, bool wrong) {
  auto* state = static_cast<volatile unsigned*>(&slot->state);
  if (*state != 0) {
    return;
  }
  if (wrong) {
    *state = 1;
  } else if (atomicCAS(&slot->state, 0, 1) != 0) {
    return;
  }
  slot->thread = static_cast<int>(threadIdx.x);
  __threadfence_system();
  *state = 2;
}

}  // namespace

CALLED_FROM_TESTS void launch_reverse_block(int* out, const int* in, bool wrong) {
  reverse_block<<<1, kThreads, 0, nullptr>>>(out, in, wrong);
}

CALLED_FROM_TESTS void launch_reverse_warps(int* out, const int* in, bool wrong) {
  reverse_warps<<<1, kThreads, 0, nullptr>>>(out, in, wrong);
}

CALLED_FROM_TESTS void launch_sum_all(float* sum, const float* in, bool wrong) {
  sum_all<<<2, kThreads, 0, nullptr>>>(sum, in, wrong);
}

CALLED_FROM_TESTS void launch_pass_on(int* numbers, bool wrong) {
  pass_on<<<2, kThreads, 0, nullptr>>>(numbers, wrong);
}

CALLED_FROM_TESTS void launch_write_one_place(int* out, bool wrong) {
  write_one_place<<<2, kThreads, 0, nullptr>>>(out, wrong);
}

CALLED_FROM_TESTS void launch_report_once(Slot* slot, bool wrong) {
  report_once<<<2, kThreads, 0, nullptr>>>(slot, wrong);
}
