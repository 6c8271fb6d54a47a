// First kernel of dense_backward_segments.cu: every tile of sorted tokens adds up its own.
#pragma once

#include <cstdint>

#include "launch_math.h"
#include "segment_task.cuh"

namespace embed_ext::cuda {

constexpr uint32_t kNoRow = 0xffffffffu;

// A block's tile, in shared memory.
struct Tile {
  int lanes;                 // of a group
  const uint32_t* row;       // [-1 .. tokens]: with the neighbours of the tile, or kNoRow
  const uint32_t* position;  // [tokens]
  int tokens;                // that count

  __device__ int occurrences(uint32_t of_row) const {
    return static_cast<int>(lower_bound(row, 0, tokens, int64_t{of_row} + 1) -
                            lower_bound(row, 0, tokens, of_row));
  }
};

// All threads of the block. `row` has room for two more than `position`. Returns how many tokens
// of the tile count.
template <class Task>
__device__ int read_tile(const Task& task, int64_t first, int tile_tokens, uint32_t* row,
                         uint32_t* position) {
  const int tokens = static_cast<int>(min(int64_t{tile_tokens}, task.num_tokens - first));
  for (int i = threadIdx.x; i < tokens + 2; i += blockDim.x) {
    const int64_t token = first + i - 1;
    row[i] = token >= 0 && token < task.num_tokens ? __ldg(task.row + token) : kNoRow;
  }
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    position[i] = __ldg(task.position + first + i);
  }
  __syncthreads();
  return static_cast<int>(lower_bound(row + 1, 0, tokens, task.num_rows));
}

// A lane's sums over the tokens of its group.
template <class Sum>
struct GroupSums {
  Sum head{};  // of the row that the token before the group has too, if `has_head`: it ends here
  Sum open{};  // of the last row
  uint32_t open_row = kNoRow;
  bool has_head = false;
};

// The sum of what the tile has of a row: the row itself, unless other tiles have some of it too.
template <class Columns, class In, class Out>
__device__ void hand_on(const SegmentTask<In, Out>& task, const Tile& tile, const Columns& columns,
                        uint32_t row, const Packed<Accumulator<In>, Columns::kCount>& sum) {
  const auto partial_sum =
      partial_sum_of<Columns, Accumulator<In>>(blockIdx.x, tile.lanes, threadIdx.x % tile.lanes);
  if (row == tile.row[-1]) {
    partial_sum.store(task.heads, sum);
  } else if (row == tile.row[tile.tokens]) {
    partial_sum.store(task.tails, sum);
  } else {
    const int count = task.scale_grad_by_freq ? tile.occurrences(row) : 1;
    write_row(task, columns, row, count, sum);
  }
}

// Tokens [first, last) of the tile, in their order. Rows that begin and end among them are handed
// on at once.
template <class Columns, class In, class Out>
__device__ auto sum_group(const SegmentTask<In, Out>& task, const Tile& tile,
                          const Columns& columns, int first, int last) {
  using Sum = Packed<Accumulator<In>, Columns::kCount>;
  GroupSums<Sum> sums;
  if (first < last) {
    sums.open_row = tile.row[first];
  }
#pragma unroll 1
  for (int k = first; k < last; k += kRowsInFlight) {
    Packed<In, Columns::kCount> value[kRowsInFlight];
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      const int64_t position = tile.position[min(k + u, last - 1)];
      value[u] = columns.load_if(k + u < last, task.grad + position * task.grad_stride);
    }
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) {
      if (k + u < last && tile.row[k + u] != sums.open_row) {
        if (sums.open_row == tile.row[first - 1]) {
          sums.head = sums.open;
          sums.has_head = true;
        } else {
          hand_on(task, tile, columns, sums.open_row, sums.open);
        }
        sums.open = Sum{};
        sums.open_row = tile.row[k + u];
      }
      add(sums.open, value[u]);
    }
  }
  return sums;
}

// What the groups before this one have of the row that its first token goes on with. `through`:
// all tokens of this group, the first one's row. All lanes of the block take part.
template <class Sum>
__device__ Sum sum_before(const Sum& own, bool through, int lanes) {
  __shared__ Sum warp_sum[kBlockWarps][kWarpSize];
  __shared__ bool warp_through[kBlockWarps];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const auto from_below = [](const Sum& sum, int distance) {
    Sum below;
#pragma unroll
    for (int i = 0; i < Sum::kSize; ++i) {
      below.values[i] = __shfl_up_sync(kFullWarp, sum.values[i], distance);
    }
    return below;
  };
  // From here to the last change of rows, or to the start of the warp.
  Sum total = own;
  for (int distance = lanes; distance < kWarpSize; distance *= 2) {
    const Sum below = from_below(total, distance);
    const bool through_below = __shfl_up_sync(kFullWarp, through, distance);
    if (lane >= distance && through) {
      add(total, below);
      through = through_below;
    }
  }
  if (lane >= kWarpSize - lanes) {
    warp_sum[warp][lane & (lanes - 1)] = total;
    warp_through[warp] = through;
  }
  Sum before = from_below(total, lanes % kWarpSize);
  bool through_before = __shfl_up_sync(kFullWarp, through, lanes % kWarpSize);
  if (lane < lanes) {
    before = Sum{};
    through_before = true;
  }
  __syncthreads();
  Sum before_warp{};
  for (int w = 0; w < warp; ++w) {
    if (!warp_through[w]) {
      before_warp = Sum{};
    }
    add(before_warp, warp_sum[w][lane & (lanes - 1)]);
  }
  if (through_before) {
    add(before, before_warp);
  }
  return before;
}

// A block owns (one tile of tokens, one chunk of the columns), a group of lanes group_tokens
// neighbouring tokens of it, a lane one piece of the columns. First each group adds up its tokens,
// row by row. Then what groups have of a row that began in a group before them is brought
// together, and the group in which the row ends hands it on.
template <class Tag, class In, class Out>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks)
    sum_tokens(SegmentTask<In, Out> task, TokenTiles tiles, Divider chunks) {
  using Columns = LaneColumns<Tag::kWidth, Tag::kVectors>;
  using Sum = Packed<Accumulator<In>, Columns::kCount>;
  __shared__ uint32_t row[TokenTiles::kMostTokens + 2];
  __shared__ uint32_t position[TokenTiles::kMostTokens];
  const int64_t number = chunks.quotient(blockIdx.x);
  const int64_t chunk = blockIdx.x - number * chunks.divisor();
  const int64_t first_token = number * tiles.tokens();
  const int tokens = read_tile(task, first_token, tiles.tokens(), row, position);
  const int lane_in_group = threadIdx.x % tiles.lanes;
  const Tile tile{tiles.lanes, row + 1, position, tokens};
  if (chunk == 0) {
    for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
      if (tile.row[i] != tile.row[i - 1]) {
        task.notes.note(tile.row[i], first_token + i);
      }
    }
  }
  const int group = threadIdx.x / tiles.lanes;
  const int first = min(group * tiles.group_tokens, tile.tokens);
  const int last = min(first + tiles.group_tokens, tile.tokens);
  const Columns columns(chunk, tiles.lanes, lane_in_group, task.width);
  auto sums = sum_group(task, tile, columns, first, last);

  const bool through = first < last && sums.open_row == tile.row[first - 1];
  const Sum before = sum_before(sums.open, through, tiles.lanes);
  if (sums.has_head) {
    add(sums.head, before);
    hand_on(task, tile, columns, tile.row[first - 1], sums.head);
  }
  if (first < last && (last == tile.tokens || sums.open_row != tile.row[last])) {
    if (through) {
      add(sums.open, before);
    }
    hand_on(task, tile, columns, sums.open_row, sums.open);
  }
}

}  // namespace embed_ext::cuda
