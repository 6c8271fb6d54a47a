// What a gradient's sums consist of: a run for each row in use, those of rows that very many tokens
// use cut into chunks, the others dealt out in pieces.
//
//   row 7 used 2,500 times, chunk 1,024:   partial 0 | partial 1 | partial 2   ->   row 7
//
// The cut into chunks depends on the batch alone, and so do the sums; the one into pieces may
// depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "group_by_row.h"
#include "row_kernels.h"

namespace embed_ext::cpu {

constexpr int64_t kChunk = 1024;  // tokens summed in one go

// Where the sums go.
struct Target {
  char* rows;  // [V, D], or [U, D] if packed
  int64_t row_bytes;
  bool packed;
  bool scale_grad_by_freq;
  bool add;       // as in SumTask
  bool streamed;  // those that are not long
};

template <class TokenT>
Run run_of(const RowGroups<TokenT>& groups, int64_t group, const Target& target) {
  const int64_t row = target.packed ? group : groups.row(group);
  const int64_t count = groups.end(group) - groups.begin(group);
  return {target.rows + row * target.row_bytes, groups.begin(group), count,
          target.scale_grad_by_freq ? count : 1};
}

// The rows of more than kChunk tokens. The runs of `partial` go to scratch rows, which those of
// `combine` add up (the positions of its tokens are scratch rows).
template <class TokenT>
struct LongRuns {
  std::vector<Run> partial, combine;
  std::vector<TokenT> scratch_tokens;
};

// The partial runs get their scratch rows once these are allocated.
template <class TokenT>
LongRuns<TokenT> find_long_runs(const RowGroups<TokenT>& groups, const Target& target) {
  using Id = decltype(TokenT::row);
  LongRuns<TokenT> found;
  int64_t end = 0;
  // Some token of a run that is longer than a chunk is at a multiple of kChunk.
  for (int64_t at = 0; at < groups.token_count(); at += kChunk) {
    if (at < end) {
      continue;
    }
    const int64_t group = groups.group_of(at);
    end = groups.end(group);
    Run run = run_of(groups, group, target);
    if (run.count <= kChunk) {
      continue;
    }
    const auto first_scratch = static_cast<int64_t>(found.scratch_tokens.size());
    for (int64_t begin = run.begin; begin < end; begin += kChunk) {
      const auto scratch_row = static_cast<Id>(found.scratch_tokens.size());
      found.scratch_tokens.push_back({static_cast<Id>(groups.row(group)), scratch_row});
      found.partial.push_back({nullptr, begin, std::min(kChunk, end - begin), 1});
    }
    run.begin = first_scratch;
    run.count = static_cast<int64_t>(found.scratch_tokens.size()) - first_scratch;
    found.combine.push_back(run);
  }
  return found;
}

// All rows in `number` pieces, alike in tokens and rows together.
template <class TokenT>
class Pieces {
 public:
  static constexpr int64_t kMostRuns = 128;

  Pieces(const RowGroups<TokenT>& groups, int64_t number) : groups_(groups), number_(number) {}

  // Calls f(runs, count) for the runs of a piece, some at a time and without the long ones.
  template <class F>
  void for_each_run(int64_t piece, const Target& target, const F& f) const {
    Run runs[kMostRuns];
    int64_t count = 0;
    const int64_t last = first_group(piece + 1);
    for (int64_t group = first_group(piece); group < last; ++group) {
      runs[count] = run_of(groups_, group, target);
      count += runs[count].count <= kChunk ? 1 : 0;
      if (count == kMostRuns) {
        f(runs, count);
        count = 0;
      }
    }
    f(runs, count);
  }

 private:
  int64_t first_group(int64_t piece) const {
    const int64_t cost = (groups_.token_count() + groups_.size()) * piece / number_;
    int64_t low = 0, high = groups_.size();
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (groups_.begin(middle) + middle < cost) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  const RowGroups<TokenT>& groups_;
  int64_t number_;
};

}  // namespace embed_ext::cpu
