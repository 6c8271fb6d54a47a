// The sums of a gradient's rows, shared out among threads: what is done with them is the caller's.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "group_by_row.h"
#include "row_kernels.h"
#include "row_runs.h"

namespace embed_ext::cpu {

// Elements a thread should at least add before a second one pays for its start.
constexpr int64_t kGrainElements = 1 << 15;

// Enough that nobody waits long for the thread with the last one, whatever a piece costs.
constexpr int64_t kPiecesPerThread = 16;

inline int64_t threads_for(int64_t elements) {
  return std::clamp<int64_t>(elements / kGrainElements, 1, at::get_num_threads());
}

// Calls f(item) for each of `count`: a thread takes the next one when it is through with its last.
// Equal shares would not do: a row that few tokens use costs more than they do, by cache misses and
// page faults, and a table sorted by frequency has all of those at one end.
template <class F>
void share_among(int64_t threads, int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t item = next++; item < count; item = next++) {
      f(item);
    }
  };
  if (threads == 1) {
    work();
  } else {
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
  }
}

// Gradient rows as the sums read them: N rows of D elements, `stride` elements apart.
struct GradRows {
  const at::Tensor& grad;  // [N, D] with unit inner stride, or [..., D] contiguous
  int64_t count;
  int64_t width;
  int64_t stride;
};

// Calls write(In{}, task) or write(Acc{}, task) for some runs at a time, which a SumTask says how
// to sum and where `target` would have them; each row in use once, by one thread of several.
//
// The long rows' chunks come first, being the largest items; their sums follow when all are there.
template <class In, class TokenT, class Write>
void sum_groups(const RowGroups<TokenT>& groups, const GradRows& rows, const Target& target,
                const Write& write) {
  using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;
  const int64_t width = rows.width;
  const In* data = rows.grad.const_data_ptr<In>();
  auto long_runs = find_long_runs(groups, target);
  const auto chunks = static_cast<int64_t>(long_runs.partial.size());
  std::vector<Acc> scratch(chunks * width);  // the last thing that can fail
  for (int64_t k = 0; k < chunks; ++k) {
    long_runs.partial[k].out = scratch.data() + k * width;
  }
  const auto sum = [&](const Run* runs, int64_t count) {
    write(In{}, SumTask<TokenT>{runs, count, groups.tokens(), groups.token_count(), data,
                                rows.stride, width, target.add, target.streamed});
  };
  const auto sum_chunk = [&](const Run* chunk) {
    sum_runs<In, Acc>(SumTask<TokenT>{chunk, 1, groups.tokens(), groups.token_count(), data,
                                      rows.stride, width, /*add=*/false, /*streamed=*/false});
  };
  const auto combine = [&](const Run* run) {
    write(Acc{}, SumTask<TokenT>{run, 1, long_runs.scratch_tokens.data(), chunks, scratch.data(),
                                 width, width, target.add, /*streamed=*/false});
  };
  const int64_t threads = threads_for(groups.token_count() * width);
  const int64_t pieces = threads == 1 ? 1 : threads * kPiecesPerThread;
  const Pieces<TokenT> others(groups, pieces);
  share_among(threads, chunks + pieces, [&](int64_t item) {
    if (item < chunks) {
      sum_chunk(&long_runs.partial[item]);
    } else {
      others.for_each_run(item - chunks, target, sum);
    }
  });
  share_among(threads_for(chunks * width), static_cast<int64_t>(long_runs.combine.size()),
              [&](int64_t item) { combine(&long_runs.combine[item]); });
}

}  // namespace embed_ext::cpu
