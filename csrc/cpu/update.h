// From an op's arguments to update_kernels.h: checks, dtypes, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <optional>

#include "../checks.h"
#include "../update_arguments.h"
#include "../update_checks.h"
#include "update_kernels.h"

namespace embed_ext::cpu {

// Raises IndexError unless indices [U] ascend strictly and all name a row.
void check_ascending(const char* op, const at::Tensor& indices, int64_t num_rows);

// Calls f(T{}, Acc{}) with the element type of the table and the type of its sums and states.
template <class F>
void with_update_types(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kDouble:
      return f(double{}, double{});
    case at::kBFloat16:
      return f(c10::BFloat16{}, float{});
    case at::kHalf:
      return f(c10::Half{}, float{});
    default:
      return f(float{}, float{});
  }
}

// Entries [U] of a checked gradient by all threads; rows are disjoint, and each is one thread's.
template <class T, class Method>
void update(const at::Tensor& weight, const at::Tensor& indices, const at::Tensor& values,
            const std::optional<int64_t>& seed, const Method& method) {
  constexpr int64_t kGrainElements = 1 << 14;
  const int64_t count = indices.numel(), width = weight.size(1);
  if (count == 0 || width == 0) {
    return;
  }
  const auto index = indices.contiguous();
  const auto task = update_task(weight, index, values, seed);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / width);
  at::parallel_for(0, count, grain,
                   [&](int64_t begin, int64_t end) { update_rows<T>(task, method, begin, end); });
}

}  // namespace embed_ext::cpu
