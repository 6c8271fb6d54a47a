// Tokens of a batch sorted by the table row they name, in token order within a row.
//
//   indices      3 1 3 0 1 3          (padding_idx = 0)
//   tokens       row 1: 1 4   row 3: 0 2 5
//   groups       0: row 1, tokens [0, 2)   1: row 3, tokens [2, 5)
//
// Every use of a row is then one run: its gradient is one sum by one thread, without atomics and
// in an order that no thread count changes; its length is the row's frequency.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "row_kernels.h"
#include "scratch.h"
#include "sort_by_row.h"

namespace embed_ext::cpu {

template <class TokenT>
class RowGroups {
 public:
  // indices [N], all inside [0, num_rows); tokens of padding_idx are left out.
  template <class Index>
  RowGroups(const Index* indices, int64_t count, int64_t num_rows, int64_t padding_idx)
      : scratch_(2 * count * sizeof(TokenT) + (count + 1) * sizeof(Id)) {
    auto* first = reinterpret_cast<TokenT*>(scratch_.data());
    TokenT* second = first + count;
    begins_ = reinterpret_cast<Id*>(second + count);
    const auto sorted = sort_by_row(indices, count, num_rows, padding_idx, first, second);
    tokens_ = sorted.tokens;
    token_count_ = sorted.count;
    find_groups();
  }

  const TokenT* tokens() const { return tokens_; }
  int64_t token_count() const { return token_count_; }

  int64_t size() const { return size_; }  // rows in use
  int64_t begin(int64_t group) const { return static_cast<int64_t>(begins_[group]); }
  int64_t end(int64_t group) const { return begin(group + 1); }
  int64_t row(int64_t group) const { return static_cast<int64_t>(tokens_[begin(group)].row); }

  // The group of the token at `position` among the sorted ones.
  int64_t group_of(int64_t position) const {
    return std::upper_bound(begins_, begins_ + size_, static_cast<Id>(position)) - begins_ - 1;
  }

  // The rows in use, ascending.
  std::vector<int64_t> rows() const {
    std::vector<int64_t> rows(size_);
    const Slices slices(size_, kSmallestSlice);
    slices.for_each([&](int64_t slice) {
      const int64_t last = slices.begin(slice + 1);
      for (int64_t group = slices.begin(slice); group < last; ++group) {
        rows[group] = row(group);
      }
    });
    return rows;
  }

 private:
  using Id = decltype(TokenT::row);

  static constexpr int64_t kSmallestSlice = 1 << 14;  // tokens worth a thread's start

  void find_groups() {
    const Slices slices(token_count_, kSmallestSlice);
    if (slices.number() == 1) {
      size_ = write_begins(0, token_count_, begins_);
    } else {
      find_groups(slices);
    }
    begins_[size_] = static_cast<Id>(token_count_);
  }

  void find_groups(const Slices& slices) {
    std::vector<int64_t> first_group(slices.number());
    slices.for_each([&](int64_t slice) {
      first_group[slice] =
          count_groups(group_start(slices.begin(slice)), group_start(slices.begin(slice + 1)));
    });
    for (int64_t& first : first_group) {
      size_ += std::exchange(first, size_);
    }
    slices.for_each([&](int64_t slice) {
      write_begins(group_start(slices.begin(slice)), group_start(slices.begin(slice + 1)),
                   begins_ + first_group[slice]);
    });
  }

  // The first token from `position` on that begins a group, or the end.
  int64_t group_start(int64_t position) const {
    if (position == 0) {
      return 0;
    }
    const auto* end = tokens_ + token_count_;
    const auto is_before = [](Id row, const TokenT& token) { return row < token.row; };
    return std::upper_bound(tokens_ + position, end, tokens_[position - 1].row, is_before) -
           tokens_;
  }

  // Of whole groups, as the next. Neither branches on whether the next row is another, which is
  // anybody's guess.
  int64_t count_groups(int64_t first, int64_t last) const {
    int64_t groups = first < last ? 1 : 0;
    for (int64_t i = first + 1; i < last; ++i) {
      groups += tokens_[i].row != tokens_[i - 1].row ? 1 : 0;
    }
    return groups;
  }

  int64_t write_begins(int64_t first, int64_t last, Id* begins) const {
    if (first == last) {
      return 0;
    }
    int64_t group = 0;
    Id begin = static_cast<Id>(first);
    begins[0] = begin;
    for (int64_t i = first + 1; i < last; ++i) {
      const bool is_other = tokens_[i].row != tokens_[i - 1].row;
      group += is_other ? 1 : 0;
      begin = is_other ? static_cast<Id>(i) : begin;
      begins[group] = begin;
    }
    return group + 1;
  }

  Scratch scratch_;  // what the pointers point into
  const TokenT* tokens_ = nullptr;
  int64_t token_count_ = 0;
  Id* begins_ = nullptr;  // [size + 1]
  int64_t size_ = 0;
};

inline bool fits_narrow_token(int64_t num_rows, int64_t count) {
  return num_rows <= UINT32_MAX && count <= UINT32_MAX;
}

}  // namespace embed_ext::cpu
