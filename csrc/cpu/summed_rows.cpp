#include "summed_rows.h"

#include <algorithm>

#include "indices.h"
#include "scratch.h"
#include "sum_groups.h"
#include "update.h"

namespace embed_ext::cpu {
namespace {

// Of sums: small beside what a core's second cache holds, so that rows of the table find room.
constexpr int64_t kTileBytes = 1 << 16;

// The runs of `task` are summed into a tile of this thread's, some at a time.
template <class In, class T, class TokenT>
void sum_in_tiles(const SumTask<TokenT>& task, const UseSums& use) {
  constexpr int64_t kMostRuns = Pieces<TokenT>::kMostRuns;
  const int64_t row_bytes = task.width * int64_t(sizeof(T));
  const int64_t most = std::clamp<int64_t>(kTileBytes / row_bytes, 1, kMostRuns);
  const Scratch tile(std::min(most, task.run_count) * row_bytes);
  Run runs[kMostRuns];
  int64_t rows[kMostRuns];
  for (int64_t begin = 0; begin < task.run_count; begin += most) {
    const int64_t count = std::min(most, task.run_count - begin);
    for (int64_t k = 0; k < count; ++k) {
      runs[k] = task.runs[begin + k];
      runs[k].out = tile.data() + k * row_bytes;
      rows[k] = static_cast<int64_t>(task.tokens[runs[k].begin].row);
    }
    auto part = task;
    part.runs = runs;
    part.run_count = count;
    sum_runs<In, T>(part);
    use(rows, tile.data(), count);
  }
}

template <class T, class TokenT>
void for_each_sum(const GradRows& grad, const int64_t* indices, int64_t num_rows,
                  const UseSums& use) {
  const RowGroups<TokenT> groups(indices, grad.count, num_rows, /*padding_idx=*/-1);
  sum_groups<T>(groups, grad, Target{}, [&](auto input, const SumTask<TokenT>& task) {
    sum_in_tiles<decltype(input), T>(task, use);
  });
}

}  // namespace

void for_each_sum(const char* op, const at::Tensor& values, const at::Tensor& indices,
                  int64_t num_rows, const UseSums& use) {
  const auto index = indices.contiguous();
  const auto* rows = index.const_data_ptr<int64_t>();
  const int64_t count = index.numel(), width = values.size(1);
  check_index_range(op, rows, count, indices.sizes(), num_rows);
  if (count == 0 || width == 0) {
    return;
  }
  const auto grad = values.stride(1) == 1 ? values : values.contiguous();
  const GradRows task{grad, count, width, grad.stride(0)};
  with_update_types(values.scalar_type(), [&](auto element, auto /*sum*/) {
    using T = decltype(element);
    if (fits_narrow_token(num_rows, count)) {
      for_each_sum<T, Token>(task, rows, num_rows, use);
    } else {
      for_each_sum<T, WideToken>(task, rows, num_rows, use);
    }
  });
}

}  // namespace embed_ext::cpu
