// Forward on the CPU: copies rows weight[indices[i]] to out[i], whatever their dtype.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "indices.h"
#include "recycled_memory.h"
#include "row_kernels.h"

namespace embed_ext::cpu {
namespace {

constexpr const char* kOp = "embedding";

// Bytes a thread should at least copy before a second one pays for its start.
constexpr int64_t kGrainBytes = 1 << 17;

// Rows whose elements do not lie side by side (a transposed table): element by element, so that
// the table itself is never copied. table_stride is in bytes, element_stride in elements.
template <class Element, class Index>
void gather_strided(const GatherTask<Index>& task, int64_t element_stride) {
  const int64_t width = task.row_bytes / static_cast<int64_t>(sizeof(Element));
  for (int64_t i = 0; i < task.count; ++i) {
    const auto* row =
        reinterpret_cast<const Element*>(task.table + int64_t(task.indices[i]) * task.table_stride);
    auto* out = reinterpret_cast<Element*>(task.out + i * task.row_bytes);
    for (int64_t j = 0; j < width; ++j) {
      out[j] = row[j * element_stride];
    }
  }
}

struct Bytes16 {
  uint64_t low, high;
};

template <class Index>
void gather(const GatherTask<Index>& task, int64_t element_size, int64_t element_stride) {
  if (element_stride == 1 || task.row_bytes == element_size) {
    return gather_rows(task);
  }
  switch (element_size) {
    case 1:
      return gather_strided<uint8_t>(task, element_stride);
    case 2:
      return gather_strided<uint16_t>(task, element_stride);
    case 4:
      return gather_strided<uint32_t>(task, element_stride);
    case 8:
      return gather_strided<uint64_t>(task, element_stride);
    default:
      return gather_strided<Bytes16>(task, element_stride);
  }
}

// Whether indices [N], N >= 1, look like a batch of one row. It then reads from the cache alone,
// and ordinary stores have the memory to themselves.
template <class Index>
bool names_one_row(const Index* indices, int64_t count) {
  return indices[0] == indices[count / 3] && indices[0] == indices[count / 2] &&
         indices[0] == indices[count - 1];
}

// weight [V, D] any strides, indices [...] contiguous int32 or int64, out [..., D] contiguous.
// Each thread checks its own slice of the indices before it reads a row for it.
template <class Index>
void lookup(const at::Tensor& weight, const at::Tensor& indices, const Index* index,
            at::Tensor& out) {
  const int64_t element_size = weight.element_size();
  const int64_t row_bytes = weight.size(1) * element_size;
  const int64_t num_rows = weight.size(0);
  const auto* table = static_cast<const char*>(weight.const_data_ptr());
  auto* out_bytes = static_cast<char*>(out.mutable_data_ptr());
  const bool streamed = worth_streaming(out_bytes, indices.numel() * row_bytes, row_bytes) &&
                        !names_one_row(index, indices.numel());
  BadIndex bad;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / (row_bytes + 1));
  at::parallel_for(0, indices.numel(), grain, [&](int64_t begin, int64_t end) {
    const int64_t position = first_bad_index(index, begin, end, num_rows);
    if (position != end) {
      return bad.report(position);
    }
    if (row_bytes > 0) {
      gather(GatherTask<Index>{out_bytes + begin * row_bytes, table, index + begin, end - begin,
                               row_bytes, weight.stride(0) * element_size, streamed},
             element_size, weight.stride(1));
    }
  });
  bad.raise_if_any(kOp, index, indices.sizes(), num_rows);
}

// weight [V, D], indices [...] -> [..., D]. The options only shape the gradient.
at::Tensor embedding(const at::Tensor& weight, const at::Tensor& indices, int64_t /*padding_idx*/,
                     bool /*scale_grad_by_freq*/, bool /*sparse*/, bool /*coalesced*/) {
  check_lookup(kOp, weight, indices);
  c10::SmallVector<int64_t, 5> sizes(indices.sizes());
  sizes.push_back(weight.size(1));
  at::Tensor out = empty_output(sizes, weight.options());
  const auto index_tensor = kernel_indices(indices);
  with_index_pointer(index_tensor,
                     [&](const auto* index) { lookup(weight, index_tensor, index, out); });
  return out;
}

}  // namespace
}  // namespace embed_ext::cpu

TORCH_LIBRARY_IMPL(embed_ext, CPU, m) { m.impl("embedding", TORCH_FN(embed_ext::cpu::embedding)); }
