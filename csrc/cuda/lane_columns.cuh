// How the lanes of a warp share the columns of rows: what every kernel that adds up rows is written
// in.
//
// A lane has kVectors vectors of kWidth neighbouring columns each, all lanes' first vectors side by
// side, then all lanes' second ones, so that a warp's access is one piece of the row. With 2 lanes:
//
//   column          0  1  2  3  4  5  6  7
//   <4, 1>          0  0  0  0  1  1  1  1     lane
//   <2, 2>          0  0  1  1  0  0  1  1
//   <1, 4>          0  1  0  1  0  1  0  1
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch_math.h"
#include "vector.cuh"

namespace embed_ext::cuda {

constexpr int kRowsInFlight = 4;  // rows, or sums of them, that a lane is waiting for at once

template <int kWidth, int kVectors>
struct LaneColumns {
  static constexpr int kCount = kWidth * kVectors;

  int64_t first;   // column of the lane's first vector
  int64_t stride;  // columns from one of its vectors to its next
  int64_t width;   // of the row: what lies beyond is neither read nor written

  // Chunk `chunk` of the row, which `lanes` lanes share.
  __device__ LaneColumns(int64_t chunk, int lanes, int lane, int64_t width)
      : first(chunk * lanes * kCount + int64_t{lane} * kWidth),
        stride(int64_t{lanes} * kWidth),
        width(width) {}

  // f(vector's number, its first column) for each of the lane's vectors that there are
  template <class F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (first + v * stride < width) {
        f(v, first + v * stride);
      }
    }
  }

  // of a row that nobody writes; zeros for the vectors that there are not, and for all if the row
  // is not wanted. One condition a vector: of two, one inside the other, the compiler makes jumps,
  // behind which the next load waits.
  template <class T>
  __device__ Packed<T, kCount> load_if(bool wanted, const T* row) const {
    Packed<T, kCount> all{};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (wanted && first + v * stride < width) {
        put(all, v, load<T, kWidth>(row + first + v * stride));
      }
    }
    return all;
  }

  template <class T>
  __device__ Packed<T, kCount> load_written(const T* row) const {
    Packed<T, kCount> all{};
    for_each(
        [&](int v, int64_t column) { put(all, v, cuda::load_written<T, kWidth>(row + column)); });
    return all;
  }

  template <class T>
  __device__ void store(T* row, const Packed<T, kCount>& all) const {
    for_each([&](int v, int64_t column) { cuda::store(row + column, part(all, v)); });
  }

  // The lane's vector v
  template <class T>
  static __device__ Packed<T, kWidth> part(const Packed<T, kCount>& all, int v) {
    Packed<T, kWidth> one;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      one.values[i] = all.values[v * kWidth + i];
    }
    return one;
  }

 private:
  template <class T>
  static __device__ void put(Packed<T, kCount>& all, int v, const Packed<T, kWidth>& one) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      all.values[v * kWidth + i] = one.values[i];
    }
  }
};

// A LaneColumns that is yet to be told where it is.
template <int kWidthOf, int kVectorsOf>
struct ColumnsTag {
  static constexpr int kWidth = kWidthOf;
  static constexpr int kVectors = kVectorsOf;
};

// Calls f(ColumnsTag, RowLanes) for rows [*, width] that allow vectors of `elements` elements, at
// most kMost. A lane has one vector, but where these are narrow and a row has more of them than a
// warp has lanes: up to four columns then, since pieces of a row that different blocks take have a
// sector of the memory in common wherever they meet.
template <int kMost, int kWidth = kMost, class F>
void with_lane_columns(int elements, int64_t width, const F& f) {
  if constexpr (kWidth > 1) {
    if (elements < kWidth) {
      return with_lane_columns<kMost, kWidth / 2>(elements, width, f);
    }
  }
  constexpr int kVectors = kWidth == kMost ? 1 : std::max(1, std::min(4, kMost) / kWidth);
  const int64_t vectors = std::max<int64_t>(width / kWidth, 1);  // without columns, one idle lane
  if (vectors <= kWarpSize) {
    f(ColumnsTag<kWidth, 1>{}, lanes_for_row(vectors));
  } else {
    f(ColumnsTag<kWidth, kVectors>{}, RowLanes{kWarpSize, ceil_div(vectors, kWarpSize * kVectors)});
  }
}

}  // namespace embed_ext::cuda
