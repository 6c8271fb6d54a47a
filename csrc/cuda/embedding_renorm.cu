// max_norm on CUDA: shrinks, in place, each row that `indices` names and whose norm is too long.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../checks.h"
#include "dispatch.cuh"
#include "group_by_row.cuh"
#include "index_check.cuh"
#include "launch_math.h"
#include "vector.cuh"

namespace embed_ext::cuda {
namespace {

constexpr const char* kOp = "embedding_renorm_";
constexpr int kMostThreads = 1024;    // of a block
constexpr int kElementsPerLane = 16;  // where the row is not longer than kMostThreads times as much

// Keeps the scale finite for a norm of zero; nn.Embedding's value.
constexpr double kEpsilon = 1e-7;

template <class R>
struct Complex {
  R real, imag;
};

// Norm and scale are taken in double, as on the CPU: the squares of float32 or bfloat16 elements
// leave the range of float32 long before the elements do, and a scale may be small where the scaled
// element is not. It costs little: each named row passes once, with a conversion and a multiply-add
// an element, which GPUs that run double at 1/64 of the speed of float do about as fast as their
// memory delivers float32 (an estimate). Only the powers of an uncommon p take longer there.
template <class T>
__device__ double magnitude(T value) {
  return fabs(static_cast<double>(widen(value)));
}
template <class R>
__device__ double magnitude(Complex<R> value) {
  return hypot(static_cast<double>(value.real), static_cast<double>(value.imag));
}

// The one rounding.
template <class T>
__device__ T rounded(double value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __double2half(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __double2bfloat16(value);
  } else {
    return static_cast<T>(value);
  }
}

template <class T>
__device__ T scaled(T value, double scale) {
  return rounded<T>(widen(value) * scale);
}
template <class R>
__device__ Complex<R> scaled(Complex<R> value, double scale) {
  return {rounded<R>(value.real * scale), rounded<R>(value.imag * scale)};
}

// How a row's elements become its norm: combine(term(|x|)) over the row, then finish().
struct Norm {
  double p;

  __device__ double start() const { return p == -INFINITY ? INFINITY : 0; }
  __device__ double term(double x) const {
    if (isinf(p) || p == 1) {
      return x;
    }
    if (p == 2) {
      return x * x;
    }
    return p == 0 ? x != 0 : pow(x, p);
  }
  __device__ double combine(double a, double b) const {
    if (!isinf(p)) {
      return a + b;
    }
    const bool take_a = (p > 0 ? a > b : a < b) || isnan(a);  // NaN wins, as in a sum
    return take_a ? a : b;
  }
  __device__ double finish(double sum) const {
    if (isinf(p) || p == 0 || p == 1) {
      return sum;
    }
    return p == 2 ? sqrt(sum) : pow(sum, 1 / p);
  }
};

// The lanes that share a row: a warp, or several if it is long.
int team_of(int64_t width) {
  int team = kWarpSize;
  while (team < kMostThreads && int64_t{team} * kElementsPerLane < width) {
    team *= 2;
  }
  return team;
}

// A team's result from its lanes' own. All threads of the block.
__device__ double combine_team(const Norm& norm, double sum, int team) {
  __shared__ double of_warp[kMostThreads / kWarpSize];
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sum = norm.combine(sum, __shfl_xor_sync(kFullWarp, sum, distance));
  }
  if (team == kWarpSize) {
    return sum;
  }
  of_warp[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  const int first = threadIdx.x / team * (team / kWarpSize);
  sum = of_warp[first];
  for (int warp = 1; warp < team / kWarpSize; ++warp) {
    sum = norm.combine(sum, of_warp[first + warp]);
  }
  return sum;
}

// A team of lanes a token, in the order of the sorted rows: the team with the first token of a row
// reads the row twice, once for the norm and, if that is too long, once to scale it; all others
// have nothing to do.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    renorm_rows(T* weight, int64_t row_stride, int64_t column_stride, int64_t width,
                const uint32_t* row, int64_t num_tokens, int64_t num_rows, int team, Norm norm,
                double max_norm) {
  const int64_t token = int64_t{blockIdx.x} * (blockDim.x / team) + threadIdx.x / team;
  const bool is_first =
      token < num_tokens && row[token] < num_rows && (token == 0 || row[token - 1] != row[token]);
  if (team == blockDim.x && !is_first) {
    return;  // the whole block
  }
  T* const values = is_first ? weight + row[token] * row_stride : nullptr;
  const int64_t end = is_first ? width : 0;
  const int lane = threadIdx.x % team;
  double sum = norm.start();
  for (int64_t i = lane; i < end; i += team) {
    sum = norm.combine(sum, norm.term(magnitude(values[i * column_stride])));
  }
  const double length = norm.finish(combine_team(norm, sum, team));
  if (length > max_norm) {
    const double scale = max_norm / (length + kEpsilon);
    for (int64_t i = lane; i < end; i += team) {
      values[i * column_stride] = scaled(values[i * column_stride], scale);
    }
  }
}

// weight [V, D] any strides
template <class T>
void launch_renorm(const at::Tensor& weight, const RowGroups& groups, double max_norm,
                   double norm_type, cudaStream_t stream) {
  const int64_t num_tokens = groups.row.numel();
  const int team = team_of(weight.size(1));
  const int threads = std::max(team, kBlockThreads);
  renorm_rows<T><<<grid_blocks(num_tokens, threads / team), threads, 0, stream>>>(
      static_cast<T*>(weight.mutable_data_ptr()), weight.stride(0), weight.stride(1),
      weight.size(1), as_uint32(groups.row), num_tokens, weight.size(0), team, Norm{norm_type},
      max_norm);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void renorm(const at::Tensor& weight, const at::Tensor& indices, double max_norm, double norm_type,
            const IndexErrors& errors, cudaStream_t stream) {
  const auto groups = group_by_row(indices, /*ignored_row=*/-1, errors, stream);
  switch (weight.scalar_type()) {
    case at::kComplexFloat:
      return launch_renorm<Complex<float>>(weight, groups, max_norm, norm_type, stream);
    case at::kComplexDouble:
      return launch_renorm<Complex<double>>(weight, groups, max_norm, norm_type, stream);
    default:
      with_float_type(weight.scalar_type(), [&](auto tag) {
        launch_renorm<typename decltype(tag)::type>(weight, groups, max_norm, norm_type, stream);
      });
  }
}

// weight [V, D] any strides, indices [...]
void embedding_renorm_(const at::Tensor& weight, const at::Tensor& indices, double max_norm,
                       double norm_type) {
  check_renorm(kOp, weight, indices, max_norm, norm_type);
  const c10::cuda::CUDAGuard device_guard(weight.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto errors = open_index_check(kOp, indices, weight.size(0));
  const auto index = indices.contiguous().view(-1);
  if (index.numel() > 0) {
    weight.size(1) == 0 ? launch_index_check(index, errors, stream)
                        : renorm(weight, index, max_norm, norm_type, errors, stream);
  }
  close_index_check(indices, stream);
}

}  // namespace
}  // namespace embed_ext::cuda

TORCH_LIBRARY_IMPL(embed_ext, CUDA, m) {
  m.impl("embedding_renorm_", TORCH_FN(embed_ext::cuda::embedding_renorm_));
}
