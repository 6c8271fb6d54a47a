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

}  // namespace

// Stable, on the bits [begin_bit, end_bit) of the keys alone. As with CUB, the result is in either
// buffer, drawn by lot here, and what the other one holds means nothing.
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
  if (begin_bit < 0 || end_bit > 32 || begin_bit >= end_bit) {
    return invalid(format("a sort of bits %d to %d", begin_bit, end_bit));
  }
  const auto part = [&](uint32_t key) {
    return (key & ((uint64_t{1} << end_bit) - 1)) >> begin_bit;
  };
  std::vector<std::pair<uint32_t, uint32_t>> pairs(count);
  for (uint32_t i = 0; i < count; ++i) {
    pairs[i] = {keys[key_selector][i], values[value_selector][i]};
  }
  std::stable_sort(pairs.begin(), pairs.end(),
                   [&](const auto& a, const auto& b) { return part(a.first) < part(b.first); });
  key_selector ^= static_cast<int>(random_below(2));
  value_selector ^= static_cast<int>(random_below(2));
  fill_never_written(workspace, needed / 8 * 8);
  for (uint32_t i = 0; i < count; ++i) {
    keys[key_selector][i] = pairs[i].first;
    keys[1 - key_selector][i] = 0xffffffff;
    values[value_selector][i] = pairs[i].second;
    values[1 - value_selector][i] = 0xffffffff;
  }
  if (counting) {
    count_sort();
  }
  return cudaSuccess;
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
