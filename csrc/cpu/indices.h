// Indices as the CPU kernels read them: contiguous, int32 or int64, and checked against the table.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>

#include "../checks.h"

namespace embed_ext::cpu {

// The narrow types are widened once: they cost little beside the rows, and each kernel then needs
// two index types, not seven.
inline at::Tensor kernel_indices(const at::Tensor& indices) {
  switch (indices.scalar_type()) {
    case at::kLong:
    case at::kInt:
      return indices.contiguous();
    case at::kUInt32:
      return indices.to(at::kLong).contiguous();
    default:
      return indices.to(at::kInt).contiguous();
  }
}

// Calls f(const int32_t*) or f(const int64_t*) on what kernel_indices() returned.
template <class F>
decltype(auto) with_index_pointer(const at::Tensor& indices, const F& f) {
  if (indices.scalar_type() == at::kInt) {
    return f(indices.const_data_ptr<int32_t>());
  }
  return f(indices.const_data_ptr<int64_t>());
}

// The first i in [begin, end) with indices[i] outside [0, num_rows), or end.
template <class Index>
int64_t first_bad_index(const Index* indices, int64_t begin, int64_t end, int64_t num_rows) {
  const auto is_bad = [&](int64_t i) {  // one compare: a negative index is huge when unsigned
    return static_cast<uint64_t>(static_cast<int64_t>(indices[i])) >=
           static_cast<uint64_t>(num_rows);
  };
  bool any = false;  // no early exit, so that the loop vectorises
  for (int64_t i = begin; i < end; ++i) {
    any |= is_bad(i);
  }
  if (!any) {
    return end;
  }
  int64_t i = begin;
  while (!is_bad(i)) {
    ++i;
  }
  return i;
}

// Keeps the smallest bad position that any thread reports, so that the error does not depend on
// how the work was split.
class BadIndex {
 public:
  void report(int64_t position) {
    int64_t seen = first_.load();
    while (position < seen && !first_.compare_exchange_weak(seen, position)) {
    }
  }

  std::optional<int64_t> position() const {
    const int64_t first = first_.load();
    return first == kNone ? std::nullopt : std::optional(first);
  }

  template <class Index>
  void raise_if_any(const char* op, const Index* indices, at::IntArrayRef sizes,
                    int64_t num_rows) const {
    if (const auto first = position()) {
      raise_index_error(op, indices[*first], *first, sizes, num_rows);
    }
  }

 private:
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> first_{kNone};
};

// Raises IndexError unless all of `indices` [N] name a row; `sizes` is the caller's shape of them.
template <class Index>
void check_index_range(const char* op, const Index* indices, int64_t count, at::IntArrayRef sizes,
                       int64_t num_rows) {
  constexpr int64_t kGrain = 1 << 16;
  BadIndex bad;
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t position = first_bad_index(indices, begin, end, num_rows);
    if (position != end) {
      bad.report(position);
    }
  });
  bad.raise_if_any(op, indices, sizes, num_rows);
}

}  // namespace embed_ext::cpu
