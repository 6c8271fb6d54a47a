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
  for (int vectors = 1; vectors <= RowTile::kTileVectors; ++vectors) {
    const RowTile tile(vectors);
    bool right = tile.rows() >= 1 && tile.rows() * vectors <= RowTile::kTileVectors;
    for (int i = 0; i < RowTile::kTileVectors; ++i) {
      right = right && tile.row_of(i) == i / vectors;
    }
    CHECK(right);
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
  for (const int64_t num_indices : {int64_t{1}, kFewTokens, kFewTokens + 1, int64_t{1} << 30}) {
    for (bool DenseBackwardCase::* reason :
         {&DenseBackwardCase::low_precision, &DenseBackwardCase::scale_grad_by_freq,
          &DenseBackwardCase::deterministic}) {
      auto call = common_case();
      call.num_indices = num_indices;
      call.*reason = true;
      CHECK(choose_dense_backward(call) ==
            (num_indices <= kFewTokens ? DenseBackward::kFew : DenseBackward::kSegments));
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
  call.num_weights = 1;
  call.num_indices = kFewTokens;
  CHECK(choose_dense_backward(call) == DenseBackward::kFew);
  call.num_indices = kFewTokens + 1;
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
  test_next_set_lane();
  test_row_tile();
  test_divider();
  test_policy_of_the_common_case();
  test_policy_that_the_result_demands();
  test_policy_of_many_duplicates();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
