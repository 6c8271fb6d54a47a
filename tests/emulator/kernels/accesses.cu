// Accesses of memory that is not there, not aligned, or not written.
#include "mistakes.h"

namespace {

constexpr int kThreads = 64;

// A thread a number; the last block has more threads than there are numbers left.
__global__ void double_each(float* out, const float* in, int count, bool wrong) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (wrong || i < count) {
    out[i] = 2 * in[i];
  }
}

// Each thread takes its neighbour's number; the last has none.
__global__ void shift_in_block(float* out, const float* in, bool wrong) {
  __shared__ float numbers[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  numbers[i] = in[i];
  __syncthreads();
  out[i] = numbers[wrong ? i + 1 : (i + 1) % kThreads];
}

// Four numbers at a time, from a pointer that may be no multiple of 16 bytes.
__global__ void copy_vectors(float4* out, const float4* in) {
  out[threadIdx.x] = __ldg(in + threadIdx.x);
}

// Every second number of shared memory is written, and every number read.
__global__ void read_shared(float* out, bool wrong) {
  __shared__ double numbers[kThreads];
  const int i = static_cast<int>(threadIdx.x);
  if (!wrong || i % 2 == 0) {
    numbers[i] = i;
  }
  __syncthreads();
  out[i] = static_cast<float>(numbers[i]);
}

}  // namespace

CALLED_FROM_TESTS void launch_double_each(float* out, const float* in, int count, bool wrong) {
  double_each<<<(count + kThreads - 1) / kThreads, kThreads, 0, nullptr>>>(out, in, count, wrong);
}

CALLED_FROM_TESTS void launch_shift_in_block(float* out, const float* in, bool wrong) {
  shift_in_block<<<1, kThreads, 0, nullptr>>>(out, in, wrong);
}

CALLED_FROM_TESTS void launch_copy_vectors(float* out, const float* in, bool wrong) {
  const float* from = wrong ? in + 1 : in;
  copy_vectors<<<1, 4, 0, nullptr>>>(reinterpret_cast<float4*>(out),
                                     reinterpret_cast<const float4*>(from));
}

CALLED_FROM_TESTS void launch_read_shared(float* out, bool wrong) {
  read_shared<<<1, kThreads, 0, nullptr>>>(out, wrong);
}
