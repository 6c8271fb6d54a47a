// Tokens of a batch sorted by the table row they name, in token order within a row.
//
//   indices      3 1 3 0 1 3          (padding_idx = 0)
//   tokens       row 1: 1 4   row 3: 0 2 5
//
// Every use of a row is then one run: its gradient is one sum by one thread, without atomics and
// in an order that no thread count changes; its length is the row's frequency.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "row_kernels.h"

namespace embed_ext::cpu {

// Stable, by row. Least significant digit first: its cost is a few passes over 8 bytes a token.
template <class TokenT>
void sort_by_row(std::vector<TokenT>& tokens, int64_t num_rows) {
  const auto count = static_cast<int64_t>(tokens.size());
  constexpr int64_t kInsertionSortBelow = 48;
  if (count < kInsertionSortBelow) {
    for (int64_t i = 1; i < count; ++i) {
      const TokenT token = tokens[i];
      int64_t j = i;
      for (; j > 0 && tokens[j - 1].row > token.row; --j) {
        tokens[j] = tokens[j - 1];
      }
      tokens[j] = token;
    }
    return;
  }
  const int digit_bits = count < 8192 ? 8 : 11;
  const uint64_t mask = (uint64_t(1) << digit_bits) - 1;
  std::vector<TokenT> other(tokens.size());
  std::vector<int64_t> place(mask + 1);
  for (int shift = 0; (static_cast<uint64_t>(num_rows - 1) >> shift) != 0; shift += digit_bits) {
    std::fill(place.begin(), place.end(), 0);
    for (const TokenT& token : tokens) {
      ++place[(static_cast<uint64_t>(token.row) >> shift) & mask];
    }
    int64_t next = 0;
    for (int64_t& slot : place) {
      next += std::exchange(slot, next);
    }
    for (const TokenT& token : tokens) {
      other[place[(static_cast<uint64_t>(token.row) >> shift) & mask]++] = token;
    }
    tokens.swap(other);
    if (shift + digit_bits >= 64) {
      break;
    }
  }
}

// indices [N], all inside [0, num_rows); tokens of padding_idx are left out.
template <class TokenT, class Index>
std::vector<TokenT> group_by_row(const Index* indices, int64_t count, int64_t num_rows,
                                 int64_t padding_idx) {
  using Id = decltype(TokenT::row);
  std::vector<TokenT> tokens;
  tokens.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] != padding_idx) {
      tokens.push_back({static_cast<Id>(indices[i]), static_cast<Id>(i)});
    }
  }
  sort_by_row(tokens, num_rows);
  return tokens;
}

// Calls f(begin, end) for each run of equal rows, in row order.
template <class TokenT, class F>
void for_each_run(const std::vector<TokenT>& tokens, const F& f) {
  const auto count = static_cast<int64_t>(tokens.size());
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    while (end < count && tokens[end].row == tokens[begin].row) {
      ++end;
    }
    f(begin, end);
  }
}

inline bool fits_narrow_token(int64_t num_rows, int64_t count) {
  return num_rows <= UINT32_MAX && count <= UINT32_MAX;
}

}  // namespace embed_ext::cpu
