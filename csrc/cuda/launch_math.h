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
constexpr unsigned kFullWarp = 0xffffffffu;  // the mask of all its lanes
constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarpSize;
constexpr int kFinishThreads = 512;  // of a block that joins the sums of tiles

// Work is cut smaller until there are as many blocks: the multiprocessors of an H100 or H200.
constexpr int64_t kEnoughBlocks = 132;

constexpr EMBED_EXT_HOST_DEVICE int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0);
}

// Blocks for `items` pieces of work. No kernel loops over what a grid cannot hold: its limit, at
// the 256 bytes or more that a block of most kernels here is given, is half a terabyte; blocks of
// embedding_renorm_ may have a single index.
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

// How a warp shares rows: `lanes` lanes a row, a power of two, and as many chunks of the row as it
// takes until each piece of it has a lane.
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

// How an update of rows is cut: `team` lanes a row, which share a warp or are whole warps, and as
// many teams a block as fill it.
struct UpdateCut {
  int team;
  int threads;  // of a block
};

// A lane has one vector of the row, where it is not too long for a block: then the fewest that will
// do. A block has fewer teams where that leaves too few blocks.
inline UpdateCut update_cut(int64_t vectors, int64_t num_rows) {
  int team = lanes_for_row(vectors).lanes;
  if (vectors > kWarpSize) {
    const int64_t turns = ceil_div(vectors, kBlockThreads);
    team = static_cast<int>(ceil_div(ceil_div(vectors, turns), kWarpSize)) * kWarpSize;
  }
  int teams = kBlockThreads / team;
  while (teams > 1 && teams * team > kWarpSize && ceil_div(num_rows, teams) < kEnoughBlocks) {
    teams /= 2;
  }
  return {team, teams * team};
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

// How unsorted tokens are cut into tiles, one a warp.
struct ScatterCut {
  int threads;      // of a block
  int tile_tokens;  // at most one a lane
};

inline ScatterCut scatter_cut(int64_t num_tokens, int64_t chunks) {
  ScatterCut cut{kBlockThreads, kWarpSize};
  const auto too_few = [&] {
    const int64_t warps = ceil_div(num_tokens, cut.tile_tokens) * chunks;
    return ceil_div(warps, cut.threads / kWarpSize) < kEnoughBlocks;
  };
  while (too_few() && cut.threads > kWarpSize) {
    cut.threads /= 2;
  }
  while (too_few() && cut.tile_tokens > 4) {
    cut.tile_tokens /= 2;
  }
  return cut;
}

// How sorted tokens are cut into tiles, one a block: a block's threads are groups of `lanes` lanes,
// and each group adds up `group_tokens` neighbouring tokens.
struct TokenTiles {
  static constexpr int kMostTokens = 1024;

  int lanes;
  int threads;
  int group_tokens;

  EMBED_EXT_HOST_DEVICE int tokens() const { return threads / lanes * group_tokens; }
};

// A row in very many tokens is added up in two stages: a group its tokens, then the groups of a
// block of kFinishThreads a share each of the tiles' sums. Where a group is a warp and has the
// square root of N / 128 tokens, both are about as long. Nothing of it depends on the device, and
// so no order of a sum does.
inline TokenTiles token_tiles(int64_t num_tokens, const RowLanes& share) {
  constexpr int kUsual = 16, kFewest = 4, kFewestOfTile = 16;
  TokenTiles tiles{share.lanes, kBlockThreads, kUsual};
  const int most = TokenTiles::kMostTokens / (kBlockThreads / share.lanes);
  tiles.group_tokens = most < kUsual ? most : kUsual;
  while (tiles.group_tokens < most &&
         int64_t{tiles.group_tokens} * tiles.group_tokens * 128 < num_tokens) {
    tiles.group_tokens *= 2;
  }
  // A tile has a sum or two of its own to write and to read: of fewer tokens, these would count.
  const auto too_few = [&] {
    return ceil_div(num_tokens, tiles.tokens()) * share.chunks < kEnoughBlocks &&
           tiles.tokens() > kFewestOfTile;
  };
  while (too_few() && tiles.group_tokens > kFewest) {
    tiles.group_tokens /= 2;
  }
  while (too_few() && tiles.threads > kWarpSize) {
    tiles.threads /= 2;
  }
  while (too_few() && tiles.group_tokens > 1) {
    tiles.group_tokens /= 2;
  }
  return tiles;
}

// Cuts short rows into tiles of whole rows, at most kMostVectors vectors each, and finds the row
// of a vector in its tile by a multiplication, since a division would cost more than the load.
//
// Exact: with m = ceil(2^20 / n) and m * n - 2^20 < n, i * m / 2^20 exceeds i / n by less than 1 /
// n as long as i * n <= 2^20, and here i < 2^10 and n <= 2^10. The product fits in 32 bits.
class RowTile {
 public:
  static constexpr int kMostVectors = 1024;

  // 1 <= vectors <= kMostVectors
  explicit RowTile(int vectors, int tile_vectors = kMostVectors)
      : vectors_(vectors),
        rows_(vectors < tile_vectors ? tile_vectors / vectors : 1),
        inverse_((kOne + vectors - 1) / vectors) {}

  EMBED_EXT_HOST_DEVICE int vectors_per_row() const { return vectors_; }
  EMBED_EXT_HOST_DEVICE int rows() const { return rows_; }
  // 0 <= vector < kMostVectors
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

// How a gather of short rows is cut into tiles, one a block whose threads take four vectors each.
struct GatherCut {
  RowTile tile;
  int threads;  // kBlockThreads or kWarpSize
};

// A tile for a block of all threads, or for a warp where that leaves too few blocks, and less than
// a warp would take where that does. There is room for `spare` vectors besides the tile's.
inline GatherCut gather_cut(int vectors, int spare, int64_t num_rows) {
  constexpr int kOfWarp = 4 * kWarpSize;
  GatherCut cut{RowTile(vectors, RowTile::kMostVectors - spare), kBlockThreads};
  for (int most = kOfWarp; most >= kOfWarp / 8; most /= 2) {
    if (ceil_div(num_rows, cut.tile.rows()) >= kEnoughBlocks || vectors + spare > kOfWarp) {
      break;
    }
    cut = {RowTile(vectors, most - spare), kWarpSize};
  }
  return cut;
}

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
