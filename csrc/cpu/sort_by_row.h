// Stable sorts of tokens by row. A stable sort has one result, so neither the method nor the number
// of threads shows.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "row_kernels.h"

namespace embed_ext::cpu {

// A range cut into equal slices, one a thread; one slice where a second does not pay.
class Slices {
 public:
  Slices(int64_t count, int64_t smallest) : count_(count) {
    if (count >= 2 * smallest && !at::in_parallel_region()) {
      number_ = std::min<int64_t>(count / smallest, at::get_num_threads());
    }
  }

  int64_t number() const { return number_; }
  int64_t begin(int64_t slice) const {
    return count_ / number_ * slice + std::min(slice, count_ % number_);
  }

  // Calls f(slice) for each, side by side.
  template <class F>
  void for_each(const F& f) const {
    if (number_ == 1) {  // what parallel_for sets up for one thread shows in a call of few tokens
      return f(0);
    }
    at::parallel_for(0, number_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end; ++slice) {
        f(slice);
      }
    });
  }

 private:
  int64_t count_;
  int64_t number_ = 1;
};

// Indices [N] as tokens, without those of padding_idx.
template <class TokenT, class Index>
struct IndexTokens {
  const Index* indices;
  int64_t padding_idx;

  template <class F>
  void for_each(int64_t begin, int64_t end, const F& f) const {
    using Id = decltype(TokenT::row);
    for (int64_t i = begin; i < end; ++i) {
      if (indices[i] != padding_idx) {
        f(TokenT{static_cast<Id>(indices[i]), static_cast<Id>(i)});
      }
    }
  }
};

template <class TokenT>
struct ListedTokens {
  const TokenT* tokens;

  template <class F>
  void for_each(int64_t begin, int64_t end, const F& f) const {
    std::for_each(tokens + begin, tokens + end, f);
  }
};

// Radix sort, least significant digit first. In each pass every slice of the tokens counts its
// digits, and then puts its tokens of a digit behind those of the slices before it:
//
//   digits of two slices                       2 0 2 | 0 1 2
//   where each puts its first 0, 1 and 2       0 2 3 | 1 2 5
template <class TokenT>
class RadixSort {
 public:
  RadixSort(int64_t count, int64_t num_rows) {
    int row_bits = 1;
    while ((static_cast<uint64_t>(num_rows - 1) >> row_bits) != 0) {
      ++row_bits;
    }
    int64_t least = INT64_MAX;
    for (int passes = 1; passes <= row_bits; ++passes) {
      const int bits = (row_bits + passes - 1) / passes;
      if (bits > kMostDigitBits) {
        continue;
      }
      const int64_t cost = passes * (kTokenCost * count + (int64_t(1) << bits));
      if (cost < least) {
        least = cost;
        passes_ = passes;
        digit_bits_ = bits;
      }
    }
  }

  int passes() const { return passes_; }

  // One pass of `number` from 0 on over what `from` makes of [0, count), each of which it drops or
  // calls back with as a token. Returns how many tokens it wrote.
  template <class From>
  int64_t pass(int number, const From& from, int64_t count, TokenT* to) {
    const Slices slices(count, kSmallestSlice);
    const int64_t digits = int64_t(1) << digit_bits_;
    const int shift = number * digit_bits_;
    const auto digit_of = [shift, mask = static_cast<Id>(digits - 1)](const TokenT& token) {
      return (token.row >> shift) & mask;
    };
    places_.assign(slices.number() * digits, 0);
    // By value: through a reference the loops would fetch what they use again after each store.
    slices.for_each([&](int64_t slice) {
      from.for_each(slices.begin(slice), slices.begin(slice + 1),
                    [digit_of, counts = places_.data() + slice * digits](const TokenT& token) {
                      ++counts[digit_of(token)];
                    });
    });
    Id next = 0;
    for (int64_t digit = 0; digit < digits; ++digit) {
      for (int64_t slice = 0; slice < slices.number(); ++slice) {
        next += std::exchange(places_[slice * digits + digit], next);
      }
    }
    slices.for_each([&](int64_t slice) {
      from.for_each(slices.begin(slice), slices.begin(slice + 1),
                    [digit_of, to, places = places_.data() + slice * digits](const TokenT& token) {
                      to[places[digit_of(token)]++] = token;
                    });
    });
    return static_cast<int64_t>(next);
  }

 private:
  using Id = decltype(TokenT::row);

  static constexpr int kMostDigitBits = 11;           // what the first two caches have room for
  static constexpr int64_t kTokenCost = 2;            // of a pass, in entries of its histogram
  static constexpr int64_t kSmallestSlice = 1 << 13;  // tokens worth a thread's start

  int passes_ = 1;
  int digit_bits_ = 1;
  std::vector<Id> places_;  // [slices, digits]
};

// For few tokens; it sorts them where they are.
template <class TokenT>
void insertion_sort(TokenT* tokens, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const TokenT token = tokens[i];
    int64_t j = i;
    for (; j > 0 && tokens[j - 1].row > token.row; --j) {
      tokens[j] = tokens[j - 1];
    }
    tokens[j] = token;
  }
}

template <class TokenT>
struct SortedTokens {
  const TokenT* tokens;
  int64_t count;
};

// indices [N], all inside [0, num_rows); tokens of padding_idx are left out. first, second: room
// for N tokens each, in one of which the result lies.
template <class TokenT, class Index>
SortedTokens<TokenT> sort_by_row(const Index* indices, int64_t count, int64_t num_rows,
                                 int64_t padding_idx, TokenT* first, TokenT* second) {
  constexpr int64_t kInsertionSortBelow = 48;
  const IndexTokens<TokenT, Index> from{indices, padding_idx};
  if (count < kInsertionSortBelow) {
    TokenT* end = first;
    from.for_each(0, count, [&](const TokenT& token) { *end++ = token; });
    insertion_sort(first, end - first);
    return {first, end - first};
  }
  RadixSort<TokenT> sort(count, num_rows);
  const int64_t kept = sort.pass(0, from, count, first);
  for (int number = 1; number < sort.passes(); ++number) {
    sort.pass(number, ListedTokens<TokenT>{first}, kept, second);
    std::swap(first, second);
  }
  return {first, kept};
}

}  // namespace embed_ext::cpu
