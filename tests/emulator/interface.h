// What device code, translated to plain C++, asks of the emulator. device.h wraps it into CUDA's
// own names; the .cpp files of this folder answer.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace emulator {

// Which thread of the launch runs.
struct Indices {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};

// Null outside of a kernel: host code of the same files then accesses memory unwatched.
extern __thread Indices* current __attribute__((tls_model("initial-exec")));

enum class Collective { kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot, kMatch, kSync };

// Runs a whole grid, then returns. body(parameters) is one thread's work.
void launch(const char* kernel, unsigned grid, unsigned block, size_t dynamic_shared,
            void (*body)(const void*), const void* parameters, size_t parameter_bytes);

// What stopped the last launch, or null if it ran to its end.
const char* launch_error();

// The block's own copy of a __shared__ variable; `key` tells those of a kernel apart.
void* shared_variable(int key, size_t bytes, size_t alignment);

// Waits for all lanes of `mask`; what comes back depends on `kind`.
uint64_t collective(Collective kind, unsigned mask, uint64_t value, int argument);
void sync_threads();

// One access each, whatever the size, as the instruction of that name would be.
void load(void* to, const void* from, size_t bytes);
void store(void* to, const void* from, size_t bytes);
void atomic_add(float* to, const float* values, int count);
void atomic_add(double* to, const double* values, int count);
unsigned compare_and_swap(unsigned* address, unsigned expected, unsigned desired);

// cub::DeviceRadixSort::SortPairs on double buffers, whose selectors it sets.
cudaError_t sort_pairs(void* workspace, size_t& bytes, uint32_t* const keys[2], int& key_selector,
                       uint32_t* const values[2], int& value_selector, uint32_t count,
                       int begin_bit, int end_bit);

// The same for the items of a block, in its shared memory.
void sort_shared(uint32_t* keys, uint32_t* values, uint32_t count, int begin_bit, int end_bit);

// The memory of cub::DeviceScan and DeviceSelect, of which the workspace means nothing afterwards.
constexpr size_t kWorkspaceBytes = 1280;
struct Memory {
  const void* begin;
  size_t bytes;
};
cudaError_t check_cub(const char* name, void* workspace, size_t bytes,
                      std::initializer_list<Memory> outputs);

}  // namespace emulator
