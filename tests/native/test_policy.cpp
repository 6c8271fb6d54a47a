// The integer arithmetic and the decisions of the CUDA half, tested without a GPU.
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <stdexcept>
#include <vector>

#include "../../csrc/cuda/dense_backward_policy.h"
#include "../../csrc/cuda/launch_math.h"
#include "../../csrc/cuda/vector_width.h"

namespace {

using namespace embed_ext::cuda;

int passed = 0;
int failed = 0;

void check(bool holds, const char* what, int line) {
  ++(holds ? passed : failed);
  if (!holds) {
    std::printf("line %d: %s\n", line, what);
  }
}
#define CHECK(condition) check((condition), #condition, __LINE__)

void test_vector_bytes() {
  CHECK(vector_bytes({0x7f0000000000, 512}) == 16);
  CHECK(vector_bytes({0x7f0000000000, 4 * 50}) == 8);    // 50 floats
  CHECK(vector_bytes({0x7f0000000000, 4 * 65}) == 4);    // 65 floats
  CHECK(vector_bytes({0x7f0000000000, 2 * 65}) == 2);    // 65 halves
  CHECK(vector_bytes({0x7f0000000000, 13}) == 1);        // 13 bytes
  CHECK(vector_bytes({0x7f0000000008, 512}) == 8);       // a table that starts in the middle
  CHECK(vector_bytes({0x7f0000000000, 512, 520}) == 8);  // rows of a wider table
  CHECK(vector_bytes({0x7f0000000000, 512, 0}) == 16);   // an expanded row: every stride is right
}

// The narrower of the two sides decides, and no access crosses a row's end.
void test_vector_elements() {
  const auto rows = [](uint64_t element_bytes, int64_t stride, uint64_t address = 0x7f0000000000) {
    return RowsInMemory{element_bytes, address, stride};
  };
  CHECK(vector_elements(rows(4, 64), 64) == 4);
  CHECK(vector_elements(rows(2, 64), 64) == 8);
  CHECK(vector_elements(rows(4, 66), 64) == 2);
  CHECK(vector_elements(rows(4, 64, 0x7f0000000008), 64) == 2);
  CHECK(vector_elements(rows(4, 64), rows(4, 64), 64) == 4);
  CHECK(vector_elements(rows(8, 64), rows(8, 64), 64) == 2);
  CHECK(vector_elements(rows(2, 64), rows(2, 64), 64) == 8);
  CHECK(vector_elements(rows(2, 64), rows(4, 64), 64) == 4);  // bfloat16 to float32
  CHECK(vector_elements(rows(2, 50), rows(4, 50), 50) == 2);
  CHECK(vector_elements(rows(2, 65), rows(4, 65), 65) == 1);
  CHECK(vector_elements(rows(4, 64), rows(4, 66), 64) == 2);  // rows of a wider table
  CHECK(vector_elements(rows(4, 64), rows(4, 64, 0x7f0000000004), 64) == 1);
  CHECK(vector_elements(rows(2, 0), rows(4, 64), 64) == 4);  // one row for all
  for (int64_t width = 1; width <= 130; ++width) {
    CHECK(width % vector_elements(rows(2, width), rows(4, width), width) == 0);
  }
}

void test_ceil_div() {
  CHECK(ceil_div(0, 8) == 0);
  CHECK(ceil_div(1, 8) == 1);
  CHECK(ceil_div(8, 8) == 1);
  CHECK(ceil_div(9, 8) == 2);
  CHECK(ceil_div(INT64_MAX, 2) == INT64_MAX / 2 + 1);
}

void test_grid_blocks() {
  CHECK(grid_blocks(1, 256) == 1);
  CHECK(grid_blocks(257, 256) == 2);
  CHECK(grid_blocks(int64_t{INT32_MAX} * 256, 256) == INT32_MAX);
  bool refused = false;
  try {
    grid_blocks(int64_t{INT32_MAX} * 256 + 1, 256);
  } catch (const std::length_error&) {
    refused = true;
  }
  CHECK(refused);
}

void test_bit_width() {
  CHECK(bit_width(0) == 0);
  CHECK(bit_width(1) == 1);
  CHECK(bit_width(2) == 2);
  CHECK(bit_width(255) == 8);
  CHECK(bit_width(256) == 9);
  CHECK(bit_width(UINT32_MAX) == 32);
}

// Every vector of a row has one lane and one chunk, and no group of lanes spans two warps.
void test_lanes_for_row() {
  for (int64_t vectors = 1; vectors <= 300; ++vectors) {
    const auto share = lanes_for_row(vectors);
    CHECK(share.lanes >= 1 && kWarpSize % share.lanes == 0);
    CHECK(share.lanes * share.chunks >= vectors);
    CHECK(share.lanes * (share.chunks - 1) < vectors);
    CHECK(share.chunks == 1 || share.lanes == kWarpSize);
  }
}

// A team is a part of a warp or whole warps, a block whole warps and whole teams; no more of a team
// idles in its last turn than its warp.
void test_update_cut() {
  for (int64_t vectors = 1; vectors <= 1500; ++vectors) {
    for (const int64_t num_rows : {1, 100, 1000, 1'000'000}) {
      const auto cut = update_cut(vectors, num_rows);
      CHECK(cut.team >= 1 && cut.team <= kBlockThreads && cut.threads <= kBlockThreads);
      CHECK(cut.team < kWarpSize ? kWarpSize % cut.team == 0 : cut.team % kWarpSize == 0);
      CHECK(cut.threads % cut.team == 0 && cut.threads % kWarpSize == 0);
      const int64_t turns = ceil_div(vectors, cut.team);
      CHECK(turns == ceil_div(vectors, kBlockThreads));
      CHECK(cut.team < kWarpSize || turns * (cut.team - kWarpSize) < vectors);
    }
  }
  CHECK(update_cut(16, 1'000'000).threads == kBlockThreads);
  CHECK(update_cut(16, 100).threads == kWarpSize);  // two rows a block, 50 blocks
  CHECK(update_cut(75, 1'000'000).team == 96);
}

void test_next_set_lane() {
  CHECK(next_set_lane(0, 0) == 32);
  CHECK(next_set_lane(1, 0) == 0);
  CHECK(next_set_lane(1, 1) == 32);
  CHECK(next_set_lane(0x80000000u, 0) == 31);
  CHECK(next_set_lane(0x80000000u, 31) == 31);
  CHECK(next_set_lane(0xffffffffu, 32) == 32);
  CHECK(next_set_lane(0xf00fu, 4) == 12);
}

void test_row_tile() {
  for (int vectors = 1; vectors <= RowTile::kMostVectors; ++vectors) {
    const RowTile tile(vectors);
    bool right = tile.rows() >= 1 && tile.rows() * vectors <= RowTile::kMostVectors;
    for (int i = 0; i < RowTile::kMostVectors; ++i) {
      right = right && tile.row_of(i) == i / vectors;
    }
    CHECK(right);
  }
}

// From 4,096 rows on there is a block for every multiprocessor, and no tile exceeds what a block
// of threads with four vectors each covers.
void test_gather_cut() {
  for (const int vectors : {1, 2, 3, 4, 16, 25, 64, 100, 127, 128}) {
    for (const int spare : {0, 1, 3, 7, 15, 31}) {
      for (const int64_t num_rows : {1, 100, 4096, 5000, 100000, 10000000}) {
        const auto [tile, threads] = gather_cut(vectors, spare, num_rows);
        CHECK(threads == kBlockThreads || threads == kWarpSize);
        CHECK(tile.rows() >= 1 && tile.rows() * vectors + spare <= 4 * threads);
        CHECK(num_rows < 4096 || ceil_div(num_rows, tile.rows()) >= kEnoughBlocks);
      }
    }
    CHECK(gather_cut(vectors, 0, 1 << 20).tile.rows() == RowTile(vectors).rows());
    CHECK(gather_cut(vectors, 0, 1 << 20).threads == kBlockThreads);
  }
}

void test_scatter_cut() {
  for (const int64_t chunks : {1, 3, 16}) {
    for (const int64_t num_tokens : {1, 100, 4096, 5000, 100000}) {
      const auto cut = scatter_cut(num_tokens, chunks);
      const int64_t warps = ceil_div(num_tokens, cut.tile_tokens) * chunks;
      CHECK(cut.tile_tokens >= 1 && cut.tile_tokens <= kWarpSize);
      CHECK(cut.threads % kWarpSize == 0 && cut.threads <= kBlockThreads);
      CHECK(num_tokens < 4096 || ceil_div(warps, cut.threads / kWarpSize) >= kEnoughBlocks);
    }
  }
  CHECK(scatter_cut(1 << 20, 1).tile_tokens == kWarpSize);
  CHECK(scatter_cut(1 << 20, 1).threads == kBlockThreads);
}

// As long as the chain of additions for one row in all tokens: a group's own, then its share of the
// tiles.
int64_t longest_chain(int64_t num_tokens, const TokenTiles& tiles) {
  const int64_t num_tiles = ceil_div(num_tokens, tiles.tokens());
  return tiles.group_tokens + ceil_div(num_tiles, kFinishThreads / tiles.lanes);
}

void test_token_tiles() {
  for (int64_t vectors = 1; vectors <= 100; ++vectors) {
    const auto share = lanes_for_row(vectors);
    for (const int64_t num_tokens : {1, 7, 100, 2048, 4096, 16384, 1000000, 100000000}) {
      const auto tiles = token_tiles(num_tokens, share);
      CHECK(tiles.lanes == share.lanes && tiles.threads % kWarpSize == 0);
      CHECK(tiles.threads >= kWarpSize && tiles.threads <= kBlockThreads);
      CHECK(tiles.tokens() >= 1 && tiles.tokens() <= TokenTiles::kMostTokens);
      CHECK(num_tokens > 16384 || longest_chain(num_tokens, tiles) <= 48);
      CHECK(num_tokens != 1000000 || longest_chain(num_tokens, tiles) <= 256);
      const int64_t blocks = ceil_div(num_tokens, tiles.tokens()) * share.chunks;
      // A warp of lanes that each have a row alone takes 32 tokens.
      const int64_t enough = share.lanes == 1 ? 4096 / kWarpSize : kEnoughBlocks;
      CHECK(num_tokens < 4096 || blocks >= enough);
    }
  }
}

void test_divider() {
  std::vector<int64_t> numbers = {1, 2, 3, 5, 7, 10, 63, 64, 65, 1000, 4095, 4096, 4097};
  for (int bit = 31; bit < 63; ++bit) {
    for (const int64_t near : {-1, 0, 1}) {
      numbers.push_back((int64_t{1} << bit) + near);
    }
  }
  std::mt19937_64 random(0);
  for (int i = 0; i < 200; ++i) {
    numbers.push_back(1 + static_cast<int64_t>(random() >> (1 + i % 63)) % INT64_MAX);
  }
  numbers.push_back(INT64_MAX);
  for (const int64_t divisor : numbers) {
    const Divider divider(divisor);
    bool right = divider.divisor() == divisor && divider.quotient(0) == 0;
    for (const int64_t value : numbers) {
      const int64_t last_multiple = value / divisor * divisor;
      right = right && divider.quotient(value) == value / divisor;
      right = right && divider.quotient(last_multiple) == value / divisor;
      right = right && divider.quotient(last_multiple - (last_multiple > 0)) ==
                           (last_multiple - (last_multiple > 0)) / divisor;
    }
    CHECK(right);
  }
}

DenseBackwardCase common_case() {
  DenseBackwardCase call{};
  call.num_indices = 4096;
  call.num_weights = 100000;
  return call;
}

void test_policy_of_the_common_case() {
  CHECK(choose_dense_backward(common_case()) == DenseBackward::kAtomic);
}

// What atomic adds cannot do, or not well, is never left to them, whatever the sizes.
void test_policy_that_the_result_demands() {
  for (const int64_t num_indices : {int64_t{1}, int64_t{2048}, int64_t{1} << 30}) {
    for (bool DenseBackwardCase::* reason :
         {&DenseBackwardCase::low_precision, &DenseBackwardCase::scale_grad_by_freq,
          &DenseBackwardCase::deterministic}) {
      auto call = common_case();
      call.num_indices = num_indices;
      call.*reason = true;
      CHECK(choose_dense_backward(call) == DenseBackward::kSegments);
    }
  }
}

void test_policy_of_many_duplicates() {
  auto call = common_case();
  call.num_weights = 1000;
  call.num_indices = 1000 * kManyDuplicates;
  CHECK(choose_dense_backward(call) == DenseBackward::kAtomic);
  call.num_indices = 1001 * kManyDuplicates;
  CHECK(choose_dense_backward(call) == DenseBackward::kSegments);
  call.num_weights = INT64_MAX;  // no product of the sizes may overflow
  call.num_indices = INT64_MAX;
  CHECK(choose_dense_backward(call) == DenseBackward::kAtomic);
}

}  // namespace

int main() {
  test_vector_bytes();
  test_vector_elements();
  test_ceil_div();
  test_grid_blocks();
  test_bit_width();
  test_lanes_for_row();
  test_update_cut();
  test_next_set_lane();
  test_row_tile();
  test_gather_cut();
  test_scatter_cut();
  test_token_tiles();
  test_divider();
  test_policy_of_the_common_case();
  test_policy_that_the_result_demands();
  test_policy_of_many_duplicates();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
