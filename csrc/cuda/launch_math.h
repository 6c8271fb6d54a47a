// The integer arithmetic that cuts work into blocks. Plain C++, tested on the CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#define EMBED_EXT_HOST_DEVICE __host__ __device__
#else
#define EMBED_EXT_HOST_DEVICE
#endif

namespace embed_ext::cuda {

constexpr int kWarpSize = 32;
constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarpSize;

constexpr EMBED_EXT_HOST_DEVICE int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

// Blocks for `items` pieces of work. No kernel loops over what a grid cannot hold: its limit, at
// the 256 bytes or more that a block of any kernel here is given, is half a terabyte.
inline unsigned grid_blocks(int64_t items, int64_t items_per_block) {
  const int64_t blocks = ceil_div(items, items_per_block);
  if (blocks > INT32_MAX) {
    throw std::length_error("embed_ext: a CUDA grid of " + std::to_string(blocks) +
                            " blocks would be needed, which is more than there can be");
  }
  return static_cast<unsigned>(blocks);
}

// Bits that hold every number from 0 to `largest`.
inline int bit_width(uint64_t largest) {
  int bits = 0;
  while (largest != 0) {
    largest >>= 1;
    ++bits;
  }
  return bits;
}

// How a warp shares rows of `vectors` vectors: `lanes` lanes a row, a power of two, each with one
// vector of it, and as many chunks of the row as that takes.
struct RowLanes {
  int lanes;
  int64_t chunks;
};

inline RowLanes lanes_for_row(int64_t vectors) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes < vectors) {
    lanes *= 2;
  }
  return {lanes, ceil_div(vectors, lanes)};
}

// The first lane from `from` on (0 to 32) whose bit is set, or 32 if there is none.
inline EMBED_EXT_HOST_DEVICE int next_set_lane(uint32_t bits, int from) {
  const auto left = static_cast<uint32_t>(uint64_t{bits} >> from);
#if defined(__CUDA_ARCH__)
  const int place = __ffs(static_cast<int>(left));
#else
  const int place = __builtin_ffs(static_cast<int>(left));
#endif
  return place == 0 ? kWarpSize : from + place - 1;
}

// Cuts short rows into tiles of whole rows, at most kTileVectors vectors each, and finds the row
// of a vector in its tile by a multiplication, since a division would cost more than the load.
//
// Exact: with m = ceil(2^20 / n) and m * n - 2^20 < n, i * m / 2^20 exceeds i / n by less than 1 /
// n as long as i * n <= 2^20, and here i < 2^10 and n <= 2^10. The product fits in 32 bits.
class RowTile {
 public:
  static constexpr int kTileVectors = 1024;

  // 1 <= vectors <= kTileVectors
  explicit RowTile(int vectors)
      : vectors_(vectors),
        rows_(kTileVectors / vectors),
        inverse_((kOne + vectors - 1) / vectors) {}

  EMBED_EXT_HOST_DEVICE int vectors_per_row() const { return vectors_; }
  EMBED_EXT_HOST_DEVICE int rows() const { return rows_; }
  // 0 <= vector < kTileVectors
  EMBED_EXT_HOST_DEVICE int row_of(int vector) const {
    return static_cast<int>((static_cast<uint32_t>(vector) * inverse_) >> kShift);
  }

 private:
  static constexpr int kShift = 20;
  static constexpr uint32_t kOne = 1u << kShift;

  int vectors_;
  int rows_;
  uint32_t inverse_;
};

// Division of numbers below 2^63 by a divisor that the kernel's threads share: a multiplication by
// its inverse, where the GPU's own 64-bit division is a subroutine.
//
// Exact: with l = ceil(log2 d), m = floor(2^(63 + l) / d) + 1 fits in 64 bits and is too large by
// m * d - 2^(63 + l) <= 2^l, so that n * m / 2^(63 + l) exceeds n / d by less than 1 / d.
class Divider {
 public:
  // divisor >= 1
  explicit Divider(int64_t divisor) : divisor_(divisor) {
    if (divisor > 1) {
      const int log2 = bit_width(static_cast<uint64_t>(divisor) - 1);
      inverse_ = static_cast<uint64_t>((Wide{1} << (63 + log2)) / divisor + 1);
      shift_ = log2 - 1;
    }
  }

  EMBED_EXT_HOST_DEVICE int64_t divisor() const { return divisor_; }
  // 0 <= value
  EMBED_EXT_HOST_DEVICE int64_t quotient(int64_t value) const {
    return divisor_ == 1 ? value : static_cast<int64_t>(high_half(value) >> shift_);
  }

 private:
  using Wide = unsigned __int128;

  EMBED_EXT_HOST_DEVICE uint64_t high_half(uint64_t value) const {
#if defined(__CUDA_ARCH__)
    return __umul64hi(value, inverse_);
#else
    return static_cast<uint64_t>((Wide{value} * inverse_) >> 64);
#endif
  }

  int64_t divisor_;
  uint64_t inverse_ = 0;
  int shift_ = 0;
};

}  // namespace embed_ext::cuda
