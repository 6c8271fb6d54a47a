// Kernels whose accesses are easily counted. None of them makes a mistake.
#include "mistakes.h"

namespace {

constexpr int kThreads = 64;

// All of a warp's 128 bytes lie side by side: 4 sectors.
__global__ void read_contiguous(float* out, const float* in) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  out[i] = in[i];
}

// A sector a lane.
__global__ void read_strided(float* out, const float* in) {
  out[threadIdx.x] = in[8 * threadIdx.x];
}

// One sector for the whole warp.
__global__ void read_one(float* out, const float* in) { out[threadIdx.x] = *in; }

// The same sectors by two instructions.
__global__ void read_twice(float* out, const float* in) {
  out[threadIdx.x] = __ldg(in + threadIdx.x) - __ldg(in + (threadIdx.x ^ 1));
}

// Two sectors a lane.
struct Large {
  int values[16];
};
__global__ void read_large(Large* out, const Large* in) { out[threadIdx.x] = in[threadIdx.x]; }

// In the first block 16 lanes go round the loop, in the second 32, of which two and two go the same
// way, each lane after its own next element.
__global__ void read_chain(int* out, const int* next, int steps) {
  int at = static_cast<int>(threadIdx.x) % 16;
  if (threadIdx.x < 16 * (blockIdx.x + 1)) {
    for (int i = 0; i < steps; ++i) {
      at = next[at];
    }
  }
  out[blockIdx.x * kThreads + threadIdx.x] = at;
}

// 16 bytes a lane, in one instruction.
__global__ void read_vectors(uint4* out, const uint4* in) {
  const uint4 value = __ldg(in + threadIdx.x);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(out + threadIdx.x)), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
               : "memory");
}

// A read, which a lane waits for, and a reduction, which it does not.
__global__ void add_to_one(float* sum, const float* in) {
  const float value = in[threadIdx.x];
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(sum)), "f"(value)
               : "memory");
}

// An atomic whose result a lane waits for, on a place of its own.
__global__ void take_places(unsigned* places) {
  if (atomicCAS(places + threadIdx.x, 0, 1) != 0) {
    places[threadIdx.x] = 2;
  }
}

// Only what goes by global memory counts.
__global__ void reverse_in_shared(int* out, const int* in) {
  __shared__ int numbers[kThreads];
  numbers[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = numbers[kThreads - 1 - threadIdx.x];
}

}  // namespace

CALLED_FROM_TESTS void launch_read_contiguous(float* out, const float* in, int blocks) {
  read_contiguous<<<blocks, kThreads, 0, nullptr>>>(out, in);
}

CALLED_FROM_TESTS void launch_read_strided(float* out, const float* in) {
  read_strided<<<1, kThreads, 0, nullptr>>>(out, in);
}

CALLED_FROM_TESTS void launch_read_one(float* out, const float* in) {
  read_one<<<2, kThreads, 0, nullptr>>>(out, in);
}

CALLED_FROM_TESTS void launch_read_twice(float* out, const float* in) {
  read_twice<<<1, kThreads, 0, nullptr>>>(out, in);
}

CALLED_FROM_TESTS void launch_read_large(Large* out, const Large* in) {
  read_large<<<1, kThreads, 0, nullptr>>>(out, in);
}

CALLED_FROM_TESTS void launch_read_chain(int* out, const int* next, int steps) {
  read_chain<<<2, kThreads, 0, nullptr>>>(out, next, steps);
}

CALLED_FROM_TESTS void launch_read_vectors(float* out, const float* in) {
  read_vectors<<<1, kThreads, 0, nullptr>>>(reinterpret_cast<uint4*>(out),
                                            reinterpret_cast<const uint4*>(in));
}

CALLED_FROM_TESTS void launch_add_to_one(float* sum, const float* in) {
  add_to_one<<<2, kThreads, 0, nullptr>>>(sum, in);
}

CALLED_FROM_TESTS void launch_take_places(unsigned* places) {
  take_places<<<1, kThreads, 0, nullptr>>>(places);
}

CALLED_FROM_TESTS void launch_reverse_in_shared(int* out, const int* in) {
  reverse_in_shared<<<1, kThreads, 0, nullptr>>>(out, in);
}
