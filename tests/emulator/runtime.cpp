// The few functions of the CUDA runtime and of CUB that csrc/cuda calls. Everything launched before
// is through by the time a function is called, so that there is nothing to wait for.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kHostAlignment = 512;

cudaError_t invalid(const std::string& what) {
  report(what, nullptr);
  return cudaErrorInvalidValue;
}

bool are_bits(int begin, int end) { return begin >= 0 && end <= 32 && begin < end; }

// Stable, on the bits [begin_bit, end_bit) of the keys alone.
void sort_pairs_by(uint32_t* keys, uint32_t* values, uint32_t count, int begin_bit, int end_bit) {
  const auto part = [&](uint32_t key) {
    return (key & ((uint64_t{1} << end_bit) - 1)) >> begin_bit;
  };
  std::vector<std::pair<uint32_t, uint32_t>> pairs(count);
  for (uint32_t i = 0; i < count; ++i) {
    pairs[i] = {keys[i], values[i]};
  }
  std::stable_sort(pairs.begin(), pairs.end(),
                   [&](const auto& a, const auto& b) { return part(a.first) < part(b.first); });
  for (uint32_t i = 0; i < count; ++i) {
    keys[i] = pairs[i].first;
    values[i] = pairs[i].second;
  }
}

}  // namespace

// Stable. As with CUB, the result is in either buffer, drawn by lot here, and what the other one
// holds means nothing.
cudaError_t sort_pairs(void* workspace, size_t& bytes, uint32_t* const keys[2], int& key_selector,
                       uint32_t* const values[2], int& value_selector, uint32_t count,
                       int begin_bit, int end_bit) {
  const size_t needed = 8 * size_t{count} + 767;
  if (workspace == nullptr) {
    bytes = needed;
    return cudaSuccess;
  }
  if (bytes < needed || !is_allocated(workspace, needed)) {
    return invalid("out of bounds: the workspace of a sort is too small");
  }
  const size_t buffer_bytes = sizeof(uint32_t) * count;
  for (int i = 0; i < 2; ++i) {
    if (!is_allocated(keys[i], buffer_bytes) || !is_allocated(values[i], buffer_bytes)) {
      return invalid("out of bounds: a buffer of a sort is too small");
    }
  }
  if (!are_bits(begin_bit, end_bit)) {
    return invalid(format("a sort of bits %d to %d", begin_bit, end_bit));
  }
  sort_pairs_by(keys[key_selector], values[value_selector], count, begin_bit, end_bit);
  const auto move = [&](uint32_t* const buffers[2], int& selector) {
    const int from = selector;
    selector ^= static_cast<int>(random_below(2));
    std::memmove(buffers[selector], buffers[from], buffer_bytes);
    std::memset(buffers[1 - selector], 0xff, buffer_bytes);
  };
  move(keys, key_selector);
  move(values, value_selector);
  fill_never_written(workspace, needed / 8 * 8);
  count_library("sort");
  return cudaSuccess;
}

cudaError_t check_cub(const char* name, void* workspace, size_t bytes,
                      std::initializer_list<Memory> outputs) {
  if (bytes < kWorkspaceBytes || !is_allocated(workspace, bytes)) {
    return invalid(format("out of bounds: the workspace of a %s is too small", name).c_str());
  }
  for (const auto& output : outputs) {
    if (!is_allocated(output.begin, output.bytes)) {
      return invalid(format("out of bounds: an output of a %s is too small", name).c_str());
    }
  }
  fill_never_written(workspace, bytes / 8 * 8);
  count_library(name);
  return cudaSuccess;
}

void sort_shared(uint32_t* keys, uint32_t* values, uint32_t count, int begin_bit, int end_bit) {
  if (!are_bits(begin_bit, end_bit)) {
    stop(format("a sort of bits %d to %d", begin_bit, end_bit), nullptr);
  }
  sort_pairs_by(keys, values, count, begin_bit, end_bit);
}

}  // namespace emulator

extern "C" {

cudaError_t cudaMemsetAsync(void* begin, int value, size_t bytes, cudaStream_t /*stream*/) {
  if (!emulator::is_allocated(begin, bytes)) {
    return emulator::invalid("out of bounds: cudaMemsetAsync");
  }
  std::memset(begin, value, bytes);
  if (emulator::counting && bytes > 0) {
    emulator::count_fill(begin, bytes);
  }
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** begin, size_t bytes, unsigned /*flags*/) {
  const size_t whole =
      (bytes + emulator::kHostAlignment - 1) / emulator::kHostAlignment * emulator::kHostAlignment;
  *begin = std::aligned_alloc(emulator::kHostAlignment, whole);
  emulator::fill_never_written(*begin, whole);
  emulator::register_memory(*begin, bytes, emulator::MemoryOf::kHost);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t /*stream*/) { return cudaSuccess; }

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

}  // extern "C"
