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
#include "summed_rows.h"
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

// The sums of a gradient's entries, a tile at a time, by whoever has made the tile: they are never
// all in memory, which would cost as much again as reading the gradient.
template <class T, class Method>
void update_summed(const char* op, const at::Tensor& weight, const RowGradient& grad,
                   const UpdateTask& task, const Method& method) {
  for_each_sum(op, grad.values, grad.indices, weight.size(0),
               [&](const int64_t* rows, void* sums, int64_t count) {
                 UpdateTask tile = task;
                 tile.values = {sums, task.width, 1};
                 tile.indices = rows;
                 tile.count = count;
                 update_rows<T>(tile, method, 0, count);
               });
}

// The entries of a gradient that check_update() has seen, by all threads; rows are disjoint, and
// each is one thread's.
template <class T, class Method>
void update(const char* op, const at::Tensor& weight, const RowGradient& grad,
            const std::optional<int64_t>& seed, const Method& method) {
  constexpr int64_t kGrainElements = 1 << 14;
  if (grad.coalesced) {
    check_ascending(op, grad.indices, weight.size(0));
  }
  const auto index = grad.indices.contiguous();
  const auto task = update_task(weight, index, grad.values, seed);
  if (!grad.coalesced) {
    update_summed<T>(op, weight, grad, task, method);
  } else if (task.count > 0 && task.width > 0) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / task.width);
    at::parallel_for(0, task.count, grain,
                     [&](int64_t begin, int64_t end) { update_rows<T>(task, method, begin, end); });
  }
}

}  // namespace embed_ext::cpu
