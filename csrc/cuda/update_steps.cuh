// What an optimizer does to an element (update_steps.inl), compiled for CUDA, and how the result is
// rounded, as in csrc/cpu/update_kernels.inl.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../update_methods.h"
#include "vector.cuh"

namespace embed_ext::cuda {

__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

#define EMBED_EXT_STEP __device__ inline
#include "../update_steps.inl"
#undef EMBED_EXT_STEP

// x rounded down or up to a number that has `dropped` bits less, each as often as it is near; x
// itself beyond `largest`, which rounding up would overflow, for a NaN and for infinity.
__device__ inline float dither(float x, uint32_t random, int dropped, uint32_t largest) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t low = (1u << dropped) - 1;
  return (bits & 0x7FFFFFFFu) > largest ? x : __uint_as_float((bits + (random & low)) & ~low);
}

// The same to a number of T.
template <class T>
__device__ float dither_to(float x, uint32_t random) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return dither(x, random, 16, 0x7F7F0000u);
  } else {
    const float magnitude = fabsf(x);
    if (!(magnitude < 0x1p-14f)) {
      return dither(x, random, 13, 0x477FE000u);
    }
    // Here the numbers of float16 are 2^-24 apart.
    const float fraction = static_cast<float>(random >> 8) * 0x1p-24f;
    const auto steps = static_cast<int>(magnitude * 0x1p24f + fraction);
    return copysignf(static_cast<float>(steps) * 0x1p-24f, x);
  }
}

}  // namespace embed_ext::cuda
