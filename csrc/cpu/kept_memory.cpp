// Kept gradients on the CPU: clearing the rows that were written, and searching for others.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>

#include "../kept_gradient.h"
#include "recycled_memory.h"
#include "row_kernels.h"

namespace embed_ext::cpu {
namespace {

constexpr int64_t kGrainBytes = int64_t(1) << 17;
constexpr int64_t kSampledRows = 64;

// The first row of [data, data + bytes) with a byte that is not zero, or -1.
int64_t first_nonzero_row(const char* data, int64_t bytes, int64_t row_bytes) {
  constexpr int64_t kBlock = 4096;
  static const char zeros[kBlock] = {};
  int64_t at = 0;
  while (at < bytes && std::memcmp(data + at, zeros, std::min(kBlock, bytes - at)) == 0) {
    at += kBlock;
  }
  while (at < bytes && data[at] == 0) {
    ++at;
  }
  return at < bytes ? at / row_bytes : -1;
}

int64_t row_bytes_of(const at::Tensor& grad) {
  return grad.size(1) * static_cast<int64_t>(grad.element_size());
}

// grad [V, D] contiguous
int64_t first_nonzero_row(const at::Tensor& grad) {
  const auto* data = static_cast<const char*>(grad.const_data_ptr());
  const int64_t row_bytes = row_bytes_of(grad);
  std::atomic<int64_t> first{grad.size(0)};
  at::parallel_for(0, grad.size(0), kGrainBytes / row_bytes + 1, [&](int64_t begin, int64_t end) {
    const int64_t row =
        first_nonzero_row(data + begin * row_bytes, (end - begin) * row_bytes, row_bytes);
    int64_t known = first;
    while (row >= 0 && begin + row < known && !first.compare_exchange_weak(known, begin + row)) {
    }
  });
  return first < grad.size(0) ? first.load() : -1;
}

// As above, of one row from each of kSampledRows stretches of the table.
int64_t first_nonzero_row_of_sample(const at::Tensor& grad, int64_t turn) {
  const auto* data = static_cast<const char*>(grad.const_data_ptr());
  const int64_t row_bytes = row_bytes_of(grad);
  const int64_t stretch = (grad.size(0) + kSampledRows - 1) / kSampledRows;
  std::minstd_rand random(static_cast<uint32_t>(turn));
  for (int64_t begin = 0; begin < grad.size(0); begin += stretch) {
    const int64_t row = begin + static_cast<int64_t>(random()) % stretch;
    if (row < grad.size(0) &&
        first_nonzero_row(data + row * row_bytes, row_bytes, row_bytes) == 0) {
      return row;
    }
  }
  return -1;
}

// grad [V, D] contiguous
void clear_rows_of(const at::Tensor& grad, const UsedRows& used) {
  const auto& rows = used.on_host;
  auto* data = static_cast<char*>(grad.mutable_data_ptr());
  const auto bytes = static_cast<int64_t>(grad.nbytes());
  const int64_t row_bytes = row_bytes_of(grad);
  const bool streamed = worth_streaming(data, bytes, row_bytes);
  const auto count = static_cast<int64_t>(rows.size());
  at::parallel_for(0, count, kGrainBytes / row_bytes + 1, [&](int64_t begin, int64_t end) {
    clear_rows(ClearTask{data, rows.data() + begin, end - begin, row_bytes, streamed});
  });
}

// grad [V, D] contiguous
void clear_all(const at::Tensor& grad) {
  fill_with_zero(grad.mutable_data_ptr(), static_cast<int64_t>(grad.nbytes()));
}

const KeptMemory memory{&zero_rows, &clear_all, &clear_rows_of, &first_nonzero_row,
                        &first_nonzero_row_of_sample};
[[maybe_unused]] const bool registered = register_kept_memory(c10::kCPU, memory);

}  // namespace
}  // namespace embed_ext::cpu
